"""The tokenizer class that goes along with an export gives the ids of training."""

import random
from pathlib import Path

import pytest

from adamoe_dist.data import Document, SentencePieceTokenizer, Tokenizer, train_tokenizer
from tests.data.conftest import words
from tests.data.test_tokenizer import NASTY, foreign_model


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    place = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Document(words(seed, 400), str(seed)) for seed in range(8)], 300, place)
    return Tokenizer.load(place)


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory) -> Path:
    from adamoe_dist.hf import write_tokenizer

    place = tmp_path_factory.mktemp("exported")
    write_tokenizer(ours, place)
    return place


@pytest.fixture(scope="module")
def theirs(exported):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported, trust_remote_code=False)


@pytest.mark.parametrize("text", [*NASTY, words(3, 60), words(4, 30) * 400])
def test_ids_and_text_are_those_of_training(ours, theirs, text):
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text == theirs.decode(ids, skip_special_tokens=True)


def test_ids_of_random_text(ours, theirs):
    draw = random.Random(0)
    alphabet = " \n\t\u2581abc_é日\U0001f389\0\r<s>/"
    for _ in range(200):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 40)))
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(theirs.encode(text)) == text


def test_special_tokens(ours, theirs):
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eod_id, ours.pad_id)
    assert ours.bos_id is None, "training has no such id before a text"
    assert len(theirs) == theirs.vocab_size == ours.vocab_size and len(theirs.get_vocab()) == ours.vocab_size
    ids = [*ours.encode("alpha"), ours.eod_id]
    assert theirs.decode(ids) == "alpha</s>"
    assert theirs.decode(ids, skip_special_tokens=True) == "alpha" == ours.decode(ids)
    assert theirs.encode("alpha</s>", split_special_tokens=False) == [*ours.encode("alpha"), ours.eod_id]
    batch = theirs(["alpha", "alpha beta gamma"], padding=True)
    assert batch["input_ids"][0][0] == ours.pad_id and batch["attention_mask"][0][0] == 0, "padding on the left"


def test_it_can_be_saved_again_and_be_trained_with(ours, theirs, exported, tmp_path):
    from transformers import AutoTokenizer

    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.encode("  x \u2581\n") == ours.encode("  x \u2581\n") and type(again).__name__ == "AdaMoETokenizer"
    for place in (exported, tmp_path):
        assert Tokenizer.load(place).fingerprint == ours.fingerprint


def test_other_models_are_used_as_they_are(tmp_path):
    from adamoe_dist.hf import transformers_tokenizer, write_tokenizer

    foreign = SentencePieceTokenizer(foreign_model(model_type="bpe"))
    write_tokenizer(foreign, tmp_path)
    loaded = transformers_tokenizer(tmp_path)
    for text in ("  hello \u2581world\n\nfoo", "hello world", "xyz hello"):
        assert loaded.encode(text) == foreign.encode(text)
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == foreign.decode(foreign.encode(text))


def test_the_tokenizer_of_a_checkpoint_is_found_by_its_fingerprint(ours, tmp_path):
    from adamoe_dist.errors import UserError
    from adamoe_dist.hf import find_tokenizer
    from tests.data.hf_tokenizers import write_bpe
    from tests.model.layers import config_of

    config, _ = config_of({"data": {"tokenizer": str(tmp_path / "elsewhere")}})
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UserError, match="copy it to"):
        find_tokenizer(checkpoint, config, ours.fingerprint)
    write_bpe(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="elsewhere has another"):
        find_tokenizer(checkpoint, config, ours.fingerprint)
    ours.save(tmp_path / "run" / "tokenizer")
    assert find_tokenizer(checkpoint, config, ours.fingerprint) == tmp_path / "run" / "tokenizer"
