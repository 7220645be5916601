"""A Hugging Face tokenizer serves wherever a SentencePiece one does."""

import json
import pickle
from pathlib import Path

import pytest

from adamoe_dist.data import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, prepare_corpus, read_info
from adamoe_dist.errors import UserError
from tests.data.conftest import documents_on_disk, words
from tests.data.hf_tokenizers import write_bpe
from tests.data.test_tokenizer import NASTY


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def bpe(bpe_dir: Path) -> HuggingFaceTokenizer:
    tokenizer = Tokenizer.load(bpe_dir)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


@pytest.mark.parametrize("text", [*NASTY, words(3, 50)])
def test_ids_are_those_of_transformers_and_lose_nothing(bpe, bpe_dir, text):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe_dir)
    assert bpe.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert bpe.decode(bpe.encode(text)) == text


def test_ids_of_special_tokens(bpe):
    assert (bpe.prefix_ids, bpe.bos_id, bpe.eod_id, bpe.pad_id) == ([], None, 1, None)
    assert bpe.vocab_size == 300 == max(bpe.hf.get_vocab().values()) + 1, "added tokens count"


def test_what_is_put_before_every_text(tmp_path):
    from tests.inference.tiny import save_tokenizer

    save_tokenizer(tmp_path / "with", with_bos=True)
    begins = Tokenizer.load(tmp_path / "with")
    assert begins.prefix_ids == [begins.bos_id] == begins.hf.encode("") and begins.decode(begins.prefix_ids) == "<s>"
    assert begins.bos_id not in begins.encode("The cat")
    save_tokenizer(tmp_path / "without", with_bos=False)
    assert Tokenizer.load(tmp_path / "without").prefix_ids == []


def test_a_document_cannot_end_another_one(bpe):
    text = "before<|end|>after<|user|>"
    ids = bpe.encode(text)
    assert bpe.eod_id not in ids and max(ids) < 298
    assert bpe.decode(ids) == text


def test_no_text_is_too_long(bpe, caplog):
    assert bpe.decode(bpe.encode("alpha " * 500)) == "alpha " * 500
    assert "longer than" not in caplog.text


def test_the_chat_template_is_at_hand(bpe, tokenizer, tmp_path):
    messages = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    assert bpe.apply_chat_template(messages, tokenize=False) == "<|user|>alpha<|end|><|assistant|>beta<|end|>"
    for other in (tokenizer, Tokenizer.load(write_bpe(tmp_path, chat_template=None))):
        with pytest.raises(UserError, match="has no chat template"):
            other.apply_chat_template(messages)


def test_it_survives_pickling_and_the_loss_of_its_directory(bpe, tmp_path):
    place = write_bpe(tmp_path / "moved")
    loaded = Tokenizer.load(place)
    frozen = pickle.dumps(loaded)
    for file in place.iterdir():
        file.unlink()
    thawed = pickle.loads(frozen)
    assert thawed.encode("alpha beta") == loaded.encode("alpha beta")
    thawed.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.fingerprint == loaded.fingerprint == bpe.fingerprint


def test_the_fingerprint_is_of_what_decides_ids(bpe, tmp_path):
    same = write_bpe(tmp_path / "a", chat_template="other", model_max_length=99)
    assert Tokenizer.load(same).fingerprint == bpe.fingerprint
    other_end = write_bpe(tmp_path / "b", eos_token="<|user|>")
    assert Tokenizer.load(other_end).fingerprint != bpe.fingerprint
    (same / "config.json").write_text('{"model_type": "mixtral"}')
    (same / "model.safetensors").write_bytes(b"weights that lie beside it")
    assert Tokenizer.load(same).fingerprint == bpe.fingerprint
    file = same / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:-1]
    file.write_text(json.dumps(raw))
    assert Tokenizer.load(same).fingerprint != bpe.fingerprint


def test_a_sentencepiece_directory_stays_one(tokenizer_dir, tmp_path):
    assert isinstance(Tokenizer.load(tokenizer_dir), SentencePieceTokenizer)
    Tokenizer.load(tokenizer_dir).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "AdaMoETokenizer"}')
    assert Tokenizer.load(tmp_path).fingerprint == Tokenizer.load(tokenizer_dir).fingerprint


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"no end-of-sequence token; name one .* in tokenizer_config.json"):
        Tokenizer.load(write_bpe(tmp_path / "a", eos_token=None))
    with pytest.raises(UserError, match="name its directory"):
        Tokenizer.load(write_bpe(tmp_path / "b") / "tokenizer.json")
    (tmp_path / "b" / "tokenizer.json").write_text("{nonsense")
    with pytest.raises(UserError, match="cannot be read by transformers"):
        Tokenizer.load(tmp_path / "b")
    own_code = write_bpe(tmp_path / "c", auto_map={"AutoTokenizer": ["bad.Bad", None]}, tokenizer_class="Bad")
    (own_code / "bad.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="needs no code of its own"):
        Tokenizer.load(own_code)
    assert not (tmp_path / "ran").exists()


def test_prepared_data_do_not_depend_on_the_workers(bpe, text_dir, tmp_path):
    for workers in (1, 2):
        prepare_corpus([str(text_dir)], bpe, tmp_path / f"w{workers}", workers=workers)
    one, two = (documents_on_disk(tmp_path / f"w{workers}_train") for workers in (1, 2))
    texts = [file.read_text() for file in sorted(text_dir.glob("*.txt"))]
    assert one == two == [[*bpe.encode(text), bpe.eod_id] for text in texts]
    info = read_info(tmp_path / "w1_train")
    assert (info.tokenizer_fingerprint, info.vocab_size, info.eod_id) == (bpe.fingerprint, 300, 1)


def test_the_tool_takes_its_directory(call_tool, refused, bpe_dir, text_dir, tmp_path):
    arguments = ["prepare_data", "--input", text_dir, "--output", tmp_path / "x", "--workers", 1, "--tokenizer"]
    assert call_tool(*arguments, bpe_dir).code == 0
    assert (tmp_path / "x_train.bin").exists()
    assert "no end-of-sequence token" in refused(*arguments, write_bpe(tmp_path / "t", eos_token=None), "--overwrite")
