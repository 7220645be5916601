"""Nothing is lost by encoding, training is repeatable, and mistakes are refused."""

import hashlib
import io
import json
import pickle
import random
from pathlib import Path

import pytest
import sentencepiece

from adamoe_dist.data import Document, SentencePieceTokenizer, Tokenizer, train_tokenizer
from adamoe_dist.data.tokenizer_training import TextSample
from adamoe_dist.errors import UserError
from tests.data.conftest import words

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "a  b   c    d",
    "\n",
    "\n\n\n\n\n  x\n\n",
    "\t\tx\t \t\n\t",
    "line\r\nline\rline",
    "\0\x01\x1f\x7f\x85",
    "<s></s><unk><pad><0x41>",
    "\u2581 \u2581\u2581x\u2581\n\u2581",
    "\u2585 \ufeff \ufffd \u2028 \u00a0 \u3000",
    "é e\u0301 ﬁ Å ½ 日本語 עברית 🎉👩‍👩‍👧",
    "1234567890 0x1F",
]


@pytest.mark.parametrize("text", NASTY)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_random_text(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    alphabet = " \n\t\u2581abc_é日\U0001f389\0\r"
    for _ in range(300):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_text_is_cut_where_no_token_crosses(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(1, 3000) + "\n\n\n\n  " + words(2, 10)
    whole = tokenizer.encode(text)
    monkeypatch.setattr("adamoe_dist.data.tokenizer_sentencepiece._CHUNK_CHARACTERS", 50)
    assert len(tokenizer._chunks(text)) > 100
    assert "".join(tokenizer._chunks(text)) == text
    assert tokenizer.encode(text) == whole


def test_text_without_line_ends_is_not_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamoe_dist.data.tokenizer_sentencepiece._CHUNK_CHARACTERS", 50)
    assert tokenizer._chunks("x" * 1000) == ["x" * 1000]


def test_ids(tokenizer: Tokenizer) -> None:
    special = {tokenizer.pad_id, tokenizer.eod_id}
    assert len(special) == 2 and None not in special
    assert tokenizer.bos_id is None and tokenizer.prefix_ids == [], "no text of training begins with one"
    ids = tokenizer.encode(words(3, 100) + "".join(NASTY))
    assert special.isdisjoint(ids)
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size == 320


def test_survives_pickling(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.encode("a  b\n")) == (tokenizer.fingerprint, tokenizer.encode("a  b\n"))


def test_directory_and_file_are_the_same(tokenizer_dir: Path) -> None:
    file = tokenizer_dir / "tokenizer.model"
    loaded = Tokenizer.load(tokenizer_dir)
    assert loaded.fingerprint == Tokenizer.load(file).fingerprint
    assert loaded.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    info = json.loads((tokenizer_dir / "tokenizer_info.json").read_text())
    assert info["fingerprint"] == loaded.fingerprint and info["vocab_size"] == loaded.vocab_size
    assert info["options"]["seed"] == 0


def test_training_is_repeatable(tmp_path: Path) -> None:
    documents = [Document(words(seed, 500), "") for seed in range(6)]
    first = train_tokenizer(documents, 300, tmp_path / "a", max_bytes=9000)
    second = train_tokenizer(iter(documents), 300, tmp_path / "b", max_bytes=9000)
    assert first == second
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert 0 < first.sampled_bytes <= 9000 < first.corpus_bytes
    assert first.corpus_bytes == sum(len(document.text.encode()) for document in documents)


def test_sample_is_whole_below_the_limit_and_seeded_above() -> None:
    text = words(1, 5000)

    def lines(limit: int, seed: int) -> list[str]:
        sample = TextSample(limit, seed)
        sample.add(text)
        return list(sample.lines())

    assert "".join(lines(10**6, 0)) == text.replace("\n", "")
    assert lines(10000, 0) == lines(10000, 0) != lines(10000, 1)


@pytest.mark.parametrize("size", [3, 267])
def test_vocabulary_too_small(refused, tmp_path: Path, text_dir: Path, size: int) -> None:
    line = refused("train_tokenizer", "--input", text_dir, "--vocab-size", size, "--output", tmp_path / "t")
    assert f"--vocab-size {size} is too small" in line and "268" in line


def test_vocabulary_too_small_for_the_characters(refused, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("".join(map(chr, range(0x4E00, 0x4F00))))
    arguments = ["--input", tmp_path / "x.txt", "--output", tmp_path / "t", "--vocab-size"]
    line = refused("train_tokenizer", *arguments, 300)
    assert "--vocab-size 300 is too small for the characters" in line
    needed = int(line.split("give ")[1].split()[0])
    assert train_tokenizer([Document((tmp_path / "x.txt").read_text(), "")], needed, tmp_path / "u").vocab_size


def test_vocabulary_larger_than_the_text(refused, call_tool, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello world foo bar " * 5)
    arguments = ["--input", tmp_path / "x.txt", "--output", tmp_path / "t", "--vocab-size"]
    line = refused("train_tokenizer", *arguments, 4000)
    assert "--vocab-size 4000 is more than this text supports" in line
    largest = int(line.split("give ")[1].split()[0])
    finished = call_tool("train_tokenizer", *arguments, largest)
    assert finished.code == 0 and f"vocab size   {largest}" in finished.out
    assert "exists already" in refused("train_tokenizer", *arguments, largest)
    assert call_tool("train_tokenizer", *arguments, largest, "--overwrite").code == 0


def test_other_refusals_of_the_trainer(refused, tmp_path: Path, text_dir: Path) -> None:
    (tmp_path / "file").write_text("x")
    common = ["train_tokenizer", "--vocab-size", 300, "--input"]
    assert "cannot be written" in refused(*common, text_dir, "--output", tmp_path / "file" / "t")
    assert "does not exist" in refused(*common, tmp_path / "no.txt", "--output", tmp_path / "t")
    assert "--max-bytes 0" in refused(*common, text_dir, "--output", tmp_path / "t", "--max-bytes", 0)
    assert "--character-coverage 2.0" in refused(
        *common, text_dir, "--output", tmp_path / "t", "--character-coverage", 2
    )
    assert "required: --output" in refused(*common, text_dir)
    assert "--vocab-size: invalid int value" in refused("train_tokenizer", "--vocab-size", "many")
    assert not (tmp_path / "t" / "tokenizer.model").exists()


def test_missing_or_damaged_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*tokenizer\.model; make one with tools/train_tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path)


def foreign_model(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world foo bar"] * 9), model_writer=model, vocab_size=30, **options
    )
    return model.getvalue()


def test_other_models_are_used_as_they_are() -> None:
    model = foreign_model(model_type="bpe")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = "  hello \u2581world\n\nfoo"
    assert SentencePieceTokenizer(model).encode(text) == processor.encode(text)
    with pytest.raises(UserError, match=r"mine has no end-of-sequence id"):
        SentencePieceTokenizer(foreign_model(model_type="bpe", eos_id=-1), "mine")
