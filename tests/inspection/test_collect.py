"""What is written down against each router's own logits, for a model of this project and for another family's."""

import re

import numpy as np
import pytest
import torch

from adamoe_dist.errors import UserError
from adamoe_dist.inference import open_model
from adamoe_dist.inspection import FilePart, TextFile, collect_routing, cut_text, left_out, read_text_files
from adamoe_dist.inspection.collect import check_same_tokens
from tests.inference.tiny import TEXT, save_model

FILES = [TextFile("a.txt", " ".join(TEXT)), TextFile("b.txt", TEXT[2] * 3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    paths = {
        "adamoe": save_model(root / "adamoe", "adamoe", normalize="true_experts", layer_frequency=1),
        "mixtral": save_model(root / "mixtral", "mixtral"),
        "llama": save_model(root / "llama", "llama"),
        "unmarked": save_model(root / "unmarked", "adamoe", with_bos=False),
    }
    return {name: open_model(path, dtype="fp32", device="cpu") for name, path in paths.items()}


def test_texts_positions_and_files(models):
    text = cut_text(models["adamoe"], FILES, context=16, max_tokens=None)
    for number, file in enumerate(FILES):
        mine = [index for index in range(len(text)) if text.files_T[index] == number]
        assert "".join(text.texts[index] for index in mine) == file.text
        assert [int(text.positions_T[index]) for index in mine] == [(place + 1) % 16 for place in range(len(mine))]
    assert "" in text.texts, "characters of several tokens"
    short = cut_text(models["adamoe"], FILES, context=16, max_tokens=21)
    assert len(short) == 21 and short.texts == text.texts[:21] and short.sources == ("a.txt",)


def test_an_id_that_ends_several_characters_is_called_by_its_byte(models):
    """Two letters that end with the same byte and have no token of their own."""
    opened = models["adamoe"]
    text = cut_text(opened, [TextFile("c.txt", "\u0120\u00e0" * 8)], context=16, max_tokens=None)
    assert [one for one in text.texts if one] == ["\u0120", "\u00e0"] * 8
    assert {label: len(places) for label, places in text.places(8)} == {"<0xC4>": 8, "<0xA0>": 16, "<0xC3>": 8}


def test_what_was_not_read_is_known(models, monkeypatch):
    opened = models["adamoe"]
    text = cut_text(opened, FILES, context=16, max_tokens=None)
    first, second = (int((text.files_T == number).sum()) for number in (0, 1))
    assert text.parts == (FilePart("a.txt", first, first, 1.0), FilePart("b.txt", second, second, 1.0))
    assert left_out(text) == ""
    short = cut_text(opened, FILES, context=16, max_tokens=21)
    share = len("".join(short.texts).encode()) / len(FILES[0].text.encode())
    assert short.parts == (FilePart("a.txt", 21, first, share), FilePart("b.txt", 0, None, 0.0))
    assert left_out(short).endswith(f": the first 21 of {first} tokens of a.txt; not read: b.txt")
    more = cut_text(opened, FILES, context=16, max_tokens=first + 5)
    assert left_out(more).endswith(f": all of a.txt; the first 5 of {second} tokens of b.txt")

    encoded = []
    monkeypatch.setattr("adamoe_dist.inspection.collect.COUNTED_CHARACTERS", 100)
    monkeypatch.setattr("adamoe_dist.inspection.collect._MARGIN", 10)
    long = [TextFile("a.txt", FILES[0].text * 100), FILES[1]]
    whole = opened.tokenizer.encode(long[0].text, add_special_tokens=False)
    encode = opened.tokenizer.encode
    monkeypatch.setattr(
        opened.tokenizer, "encode", lambda text, **options: (encoded.append(len(text)), encode(text, **options))[1]
    )
    some = cut_text(opened, long, context=16, max_tokens=300)
    assert some.ids_T.tolist() == whole[:300] and some.parts[0].tokens is None
    assert max(encoded) < len(long[0].text) / 4, "a long file is not cut whole"
    assert re.search(r": the first 300 tokens of a.txt \([\d.]+ % of its bytes\); not read: b.txt$", left_out(some))
    check_same_tokens(some, opened, long, "itself")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("word", encoding="utf-8-sig")
    assert read_text_files([str(tmp_path / "a.txt")])[0].text == "word"


@pytest.mark.parametrize("family", ["adamoe", "mixtral"])
def test_experts_and_weights_are_those_of_the_logits(models, family):
    opened = models[family]
    text = cut_text(opened, FILES[::-1], context=16, max_tokens=290)
    assert len(text.sources) == 2
    routing = collect_routing(opened, text)
    config = opened.model.config
    num_true = 4
    num_null = getattr(config, "num_null_experts", 0)
    assert (routing.num_experts, routing.num_null, routing.top_k) == (num_true, num_null, config.num_experts_per_tok)
    assert [layer.number for layer in routing.layers] == [0, 1]
    for token in range(len(text)):
        start_of_file = text.files_T.tolist().index(text.files_T[token])
        window = (token - start_of_file + 1) // 16
        first = start_of_file + max(16 * window - 1, 0)
        ids = ([] if window else [opened.prefix_id]) + text.ids_T[first : token + 1].tolist()
        with torch.no_grad():
            outputs = opened.model(torch.tensor([ids]), output_router_logits=True)
        for layer, logits in zip(routing.layers, outputs.router_logits, strict=True):
            scores = logits.reshape(len(ids), -1)[-1]
            chosen = [int(one) for one in scores.argsort(descending=True)[: routing.top_k] if one < num_true]
            assert sorted(chosen) == np.nonzero(layer.selected_TE[token])[0].tolist(), (token, layer.number)
            if chosen:
                weights = torch.softmax(scores[chosen], dim=0)
                assert layer.weights_TE[token, chosen].tolist() == pytest.approx(weights.tolist(), abs=1e-3)
    assert routing.loads_LT.min() < routing.top_k or not num_null


def test_hooks_are_gone_afterwards(models):
    opened = models["adamoe"]
    collect_routing(opened, cut_text(opened, FILES, context=16, max_tokens=20))
    assert not any(module._forward_hooks for module in opened.model.modules())


def test_progress_counts_every_token(models):
    text = cut_text(models["adamoe"], FILES, context=16, max_tokens=50)
    told = []
    collect_routing(models["adamoe"], text, told.append)
    assert sum(told) == 50 and told[0] == 15, "the token before a file is not counted"


def test_a_dense_model_and_other_tokens_are_refused(models):
    text = cut_text(models["llama"], FILES, context=16, max_tokens=20)
    with pytest.raises(UserError, match="no layer with experts"):
        collect_routing(models["llama"], text)
    with pytest.raises(UserError, match="--compare other: its tokenizer cuts the text into other tokens"):
        check_same_tokens(text, models["unmarked"], FILES, "other")
    check_same_tokens(text, models["adamoe"], FILES, "other")


def test_layers_have_their_numbers_in_the_model(tmp_path):
    """One layer of Qwen3-MoE is dense, and the last of each two of ours has experts."""
    for family, changes in (("qwen3_moe", {}), ("adamoe", {"layer_frequency": 2})):
        opened = open_model(save_model(tmp_path / family, family, **changes), dtype="fp32", device="cpu")
        routing = collect_routing(opened, cut_text(opened, FILES, context=16, max_tokens=20))
        assert [layer.number for layer in routing.layers] == [1], family
        assert routing.loads_LT.shape == (1, 20)
