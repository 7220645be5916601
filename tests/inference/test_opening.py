"""Opening Hugging Face directories, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from adamoe_dist.errors import UserError
from adamoe_dist.inference import count_experts, cut_document, longest_input, open_model, score_documents
from tests.inference.tiny import CONTEXT, save_model, save_tokenizer, tiny_model


def test_a_directory_is_opened_as_transformers_would(directories) -> None:
    from transformers import AutoModelForCausalLM

    opened = open_model(directories["mixtral"], device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(directories["mixtral"])
    ids = torch.tensor([[1, 5, 9, 30]])
    torch.testing.assert_close(opened.model(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
    assert opened.context == longest_input(directories["mixtral"]) == CONTEXT
    assert "mixtral" in opened.description and "fp32 on cpu" in opened.description


@pytest.mark.parametrize(("family", "expected"), [("mixtral", 2), ("olmoe", 3), ("adamoe", 2), ("llama", None)])
def test_the_reference_of_saved_products(opened_models, family: str, expected: int | None) -> None:
    assert opened_models[family].reference_top_k == expected


def test_what_stands_before_a_text_is_what_training_put_there(opened_models, tmp_path) -> None:
    from adamoe_dist.data import Document, Tokenizer, train_tokenizer
    from adamoe_dist.hf import transformers_tokenizer

    opened = opened_models["llama"]
    assert opened.prefix_id == opened.tokenizer.bos_token_id == opened.tokenizer.encode("")[0]
    train_tokenizer([Document("a small text, again and again " * 40, "x")], 280, tmp_path)
    own = dataclasses.replace(opened, tokenizer=transformers_tokenizer(tmp_path))
    assert own.tokenizer.bos_token_id is None and own.prefix_id == Tokenizer.load(tmp_path).eod_id
    own.tokenizer.bos_token = "<s>"  # as in directories that name one and never put it anywhere
    assert own.prefix_id == Tokenizer.load(tmp_path).eod_id


def test_the_type_is_chosen(directories) -> None:
    assert open_model(directories["olmoe"], dtype="bf16").model.dtype == torch.bfloat16


def test_the_own_class_is_used_though_the_directory_brings_code(tmp_path) -> None:
    path = save_model(tmp_path / "model", "adamoe")
    (path / "modeling_adamoe.py").write_text("raise RuntimeError('code of a directory was run')\n")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_adamoe.AdaMoEConfig",
        "AutoModelForCausalLM": "modeling_adamoe.AdaMoEForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    assert type(open_model(path).model).__module__ == "adamoe_dist.hf.modeling_adamoe"


def test_an_accelerate_map_gives_the_same_model(directories, tmp_path) -> None:
    ids = torch.tensor([[1, 5, 9, 30]])
    expected = open_model(directories["adamoe"], device="cpu").model(ids).logits
    mapped = open_model(directories["adamoe"], device="sequential")
    torch.testing.assert_close(mapped.model(ids.to(mapped.device)).logits.cpu(), expected)


def test_a_model_on_the_disk_is_used_as_one_in_memory(directories, tmp_path) -> None:
    """accelerate fetches weights for each use; its hooks move what they compute with."""
    from accelerate import disk_offload

    plain, offloaded = (open_model(directories["adamoe"], device="cpu") for _ in range(2))
    disk_offload(offloaded.model, tmp_path, execution_device=torch.device("cpu"))
    assert offloaded.model.get_input_embeddings().weight.device.type == "meta"
    if not torch.cuda.is_available():
        assert offloaded.device.type == "cpu"
        documents = [cut_document(plain, "The cat sat on the mat", "text", 8, 4)]
        with count_experts(offloaded.model) as use:
            nats = score_documents(offloaded, documents, 2, use)
        assert nats == pytest.approx(score_documents(plain, documents, 2)) and use.report(2)["tokens"] > 5


def _without(path, *names: str):
    for name in names:
        (path / name).unlink()
    return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path / "nowhere", "nowhere is not a directory"),
        (lambda path: _without(path, "config.json"), "no complete checkpoint"),
        (lambda path: _without(path, "model.safetensors"), "cannot be opened by transformers"),
        (lambda path: _without(path, "tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    ],
)
def test_what_is_missing_is_named(tmp_path, directories, spoil, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directories["mixtral"], copy)
    with pytest.raises(UserError, match=message) as refusal:
        open_model(spoil(copy))
    assert str(copy) in str(refusal.value)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (Q_PROJ, None, f"1 weights of the model are not in its files, as {Q_PROJ}"),
        (Q_PROJ, (3, 5), rf"1 weights have another shape .*, as {Q_PROJ}: \(3, 5\), not \(32, 32\)"),
        (EXPERT, None, "weights are missing or have another shape"),
        (EXPERT, (3, 5), "weights are missing or have another shape"),
    ],
)
def test_weights_that_are_missing_are_not_made_up(
    tmp_path, directories, capfd, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directories["mixtral"], copy)
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    if shape is not None:
        weights[name] = torch.zeros(shape)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message) as refusal:
        open_model(copy, device="cpu")
    assert str(copy) in str(refusal.value) and "MISSING" not in capfd.readouterr().err


def test_tied_weights_are_not_missing(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = open_model(tmp_path, device="cpu").model
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


def test_a_file_that_was_cut_is_refused(tmp_path, directories) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directories["mixtral"], copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be opened by transformers"):
        open_model(copy, device="cpu")


@pytest.mark.parametrize("text_key", [None, "text_config"])
def test_the_length_is_found_by_whatever_name(tmp_path, text_key: str | None) -> None:
    """GPT-2 calls it n_positions; models of pictures and text nest it."""
    if text_key is None:
        tokenizer = save_tokenizer(tmp_path)
        ids = {"bos_token_id": None, "eos_token_id": None}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=32, n_layer=1, n_head=2, **ids)
        )
        model.save_pretrained(tmp_path)
        assert open_model(tmp_path, device="cpu").context == 48
    else:
        config = {"model_type": "llava", "text_config": {"model_type": "llama", "max_position_embeddings": 48}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert longest_input(tmp_path) == 48


def test_foreign_code_is_not_run(tmp_path, directories) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directories["mixtral"], copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "their_code.TheirConfig"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "their_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be opened"):
        open_model(copy)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    tiny_model("mixtral", len(tokenizer) - 1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"the tokenizer has {len(tokenizer)} ids, the model {len(tokenizer) - 1}"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "--dtype int3"),
        ({"device": "toaster"}, "--device toaster"),
        ({"device": "meta"}, "--device meta"),
        ({"device": "cuda:7"}, "CUDA"),
    ],
)
def test_options_are_checked(directories, options: dict[str, str], message: str) -> None:
    if options.get("device") == "cuda:7" and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(UserError, match=message):
        open_model(directories["mixtral"], **options)
