"""The same data from any number of workers, a split that holds, and nothing half done."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from adamoe_dist.data import Document, TokenDataset, Tokenizer, prepare_corpus, read_info
from adamoe_dist.data.prepare import _batches
from adamoe_dist.data.storage import PartWriter, entropy
from adamoe_dist.errors import UserError
from tests.data.conftest import TOOLS, documents_on_disk, words

FILES = [f"{part}.{ending}" for part in ("train", "validation") for ending in ("bin", "idx", "json")]


def contents(prefix: Path) -> dict[str, bytes]:
    return {name: Path(f"{prefix}_{name}").read_bytes() for name in FILES}


def texts_of(directory: Path) -> list[str]:
    return [file.read_bytes().decode() for file in sorted(directory.iterdir())]


def test_parts_hold_every_document_once_in_order(prepared: Path, text_dir: Path, tokenizer: Tokenizer) -> None:
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts_of(text_dir)]
    train, validation = (documents_on_disk(f"{prepared}_{part}") for part in ("train", "validation"))
    assert train and validation
    assert sorted([*train, *validation]) == sorted(expected)
    for part in (train, validation):
        places = [expected.index(document) for document in part]
        assert places == sorted(places)


def test_description(prepared: Path, text_dir: Path, tokenizer: Tokenizer) -> None:
    parts = {part: read_info(f"{prepared}_{part}") for part in ("train", "validation")}
    assert sum(info.documents for info in parts.values()) == 30
    assert sum(info.bytes for info in parts.values()) == sum(len(text.encode()) for text in texts_of(text_dir))
    for part, info in parts.items():
        tokens = [token for document in documents_on_disk(f"{prepared}_{part}") for token in document]
        frequencies = [count / len(tokens) for count in Counter(tokens).values()]
        assert info.tokens == len(tokens)
        assert info.unigram_entropy == pytest.approx(-sum(f * math.log(f) for f in frequencies))
        assert info.tokenizer_fingerprint == tokenizer.fingerprint
        assert info.sources == [str(text_dir)]


def test_entropy_of_equal_frequencies() -> None:
    assert entropy(np.array([5, 0, 5, 5, 5])) == pytest.approx(math.log(4))
    assert entropy(np.zeros(3, dtype=np.int64)) == 0.0


def test_workers_do_not_matter(
    prepared: Path, text_dir: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adamoe_dist.data.prepare._BATCH_DOCUMENTS", 2)
    for workers in (2, 3):
        prefix = tmp_path / f"by_{workers}"
        prepare_corpus([str(text_dir)], tokenizer, prefix, workers=workers, validation_fraction=0.2)
        assert contents(prefix) == contents(prepared)


def test_seed_moves_the_split_and_nothing_else(
    prepared: Path, text_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare_corpus([str(text_dir)], tokenizer, tmp_path / "x", validation_fraction=0.2, seed=1)
    other, first = documents_on_disk(f"{tmp_path}/x_validation"), documents_on_disk(f"{prepared}_validation")
    assert other != first


def test_copies_stay_on_one_side(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"text": words(seed % 20, 5)}) + "\n" for seed in range(60)))
    prepare_corpus([str(file)], tokenizer, tmp_path / "x", validation_fraction=0.4)
    sides = [
        {tuple(document) for document in documents_on_disk(f"{tmp_path}/x_{part}")} for part in ("train", "validation")
    ]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("fraction", [1e-30, 0.01, 0.999999])
def test_each_part_gets_a_document(tokenizer: Tokenizer, tmp_path: Path, fraction: float) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    summary = prepare_corpus([str(tmp_path)], tokenizer, tmp_path / "x", validation_fraction=fraction)
    assert summary.validation is not None
    assert summary.train.documents == summary.validation.documents == 1


def test_tool(call_tool, refused, text_dir: Path, tokenizer_dir: Path, prepared: Path, tmp_path: Path) -> None:
    arguments = ["--input", text_dir, "--tokenizer", tokenizer_dir / "tokenizer.model", "--workers", 1]
    prefix = tmp_path / "deep" / "words"
    finished = call_tool("prepare_data", *arguments, "--output", prefix, "--validation-fraction", 0.2)
    assert finished.code == 0 and finished.error_lines == []
    assert "bytes/token" in finished.out and f"{prefix}_validation: " in finished.out
    assert contents(prefix) == contents(prepared)
    assert "_train.bin exists already" in refused("prepare_data", *arguments, "--output", prefix)
    again = call_tool("prepare_data", *arguments, "--output", prefix, "--overwrite", "--validation-fraction", 0)
    assert again.code == 0
    assert sorted(file.name for file in prefix.parent.iterdir()) == [
        f"words_train.{ending}" for ending in ("bin", "idx", "json")
    ]


def test_refusals_of_the_tool(refused, text_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    common = ["prepare_data", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out" / "x", "--input"]
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert "--validation-fraction 0.1 needs two" in refused(*common, tmp_path / "one.txt", "--validation-fraction", 0.1)
    assert "--validation-fraction 1.0 is not in" in refused(*common, text_dir, "--validation-fraction", 1)
    assert "--workers 0" in refused(*common, text_dir, "--workers", 0)
    assert "does not exist" in refused(*common, tmp_path / "no.txt")
    assert "not UTF-8 at byte 0" in refused(*common, text_dir, tmp_path / "bad.txt")
    assert "--text-key: expected one argument" in refused(*common, tmp_path / "one.txt", "--text-key")
    common[4] = f"{tmp_path}/"
    assert "is a directory; add a name" in refused(*common, text_dir)
    common[4] = str(tmp_path / "one.txt" / "x")
    assert "cannot be written" in refused(*common, text_dir)
    common[2] = tmp_path / "nothing"
    assert "tokenizer" in refused(*common, text_dir)
    assert not list((tmp_path / "out").glob("*"))


def test_a_failure_leaves_nothing(
    tokenizer: Tokenizer, text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = PartWriter.add

    def failing(self: PartWriter, tokens: np.ndarray, text_bytes: int) -> None:
        if self.documents == 5:
            raise KeyboardInterrupt
        add(self, tokens, text_bytes)

    monkeypatch.setattr(PartWriter, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus([str(text_dir)], tokenizer, tmp_path / "x", validation_fraction=0.2, workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_older_data(
    tokenizer: Tokenizer, text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_corpus([str(text_dir)], tokenizer, tmp_path / "x", validation_fraction=0.2)
    before = contents(tmp_path / "x")

    def failing(self: PartWriter) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PartWriter, "finish", failing)
    with pytest.raises(OSError, match="disk full"):
        prepare_corpus([str(text_dir)], tokenizer, tmp_path / "x", validation_fraction=0.3, overwrite=True)
    assert contents(tmp_path / "x") == before
    assert len(list(tmp_path.iterdir())) == len(before)


def test_killed_preparation_looks_incomplete(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A process that is killed while it writes leaves no file of a part, and no worker behind."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": words(1, 400)}) + "\n")
    with (tmp_path / "x.jsonl").open("a") as stream:
        for seed in range(20000):
            stream.write(json.dumps({"text": f"{seed} " + "some more text " * 60}) + "\n")
    command = [TOOLS / "prepare_data.py", "--input", tmp_path / "x.jsonl", "--tokenizer", tokenizer_dir]
    process = subprocess.Popen(
        [sys.executable, *command, "--output", tmp_path / "out" / "x", "--workers", "2"],
        env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.glob("out/.*.bin.*.partial")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list((tmp_path / "out").glob("x_*"))
    with pytest.raises(UserError, match="there is no"):
        TokenDataset(tmp_path / "out" / "x_train", 8, 0)
    while _alive_in_session(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _alive_in_session(session: int) -> list[int]:
    alive = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z" and int(rest[2]) == session:
            alive.append(int(entry.name))
    return alive


def test_batches_keep_order_and_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adamoe_dist.data.prepare._BATCH_BYTES", 10)
    documents = [Document("x" * size, str(size)) for size in (1, 2, 30, 4, 4, 4, 1)]
    batches = list(_batches(documents))
    assert [document for batch in batches for document in batch] == documents
    assert [len(batch) for batch in batches] == [3, 3, 1]
