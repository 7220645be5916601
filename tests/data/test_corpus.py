"""Reading documents, and what is refused on the way."""

import gzip
import inspect
import json
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from adamoe_dist.data import corpus_bytes, iterate_documents
from adamoe_dist.data.standard_library import standard_library_documents
from adamoe_dist.errors import UserError


def texts(*inputs: Path | str, key: str = "text") -> list[str]:
    return [document.text for document in iterate_documents([str(name) for name in inputs], key)]


def write_lines(path: Path, records: list[object]) -> Path:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_every_kind_of_file_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    (tmp_path / "a.txt").write_bytes(b"one\r\n two\n")
    (tmp_path / "b" / "x.md").write_text("three")
    (tmp_path / "blank.txt").write_text(" \n\t")
    write_lines(tmp_path / "c.jsonl", [{"text": "four"}, {"text": "  "}, {"text": "five"}])
    write_lines(tmp_path / "d.jsonl.gz", [{"text": "six"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["seven", "eight"]}), tmp_path / "e.parquet")
    assert texts(tmp_path) == ["one\r\n two\n", "three", "four", "five", "six", "seven", "eight"]
    assert texts(tmp_path / "d.jsonl.gz", tmp_path / "a.txt") == ["six", "one\r\n two\n"]


def test_another_key(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "c.jsonl", [{"body": "x", "text": 3}])
    assert texts(file, key="body") == ["x"]


def test_sources_name_the_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "c.jsonl", [{"text": "x"}, {"text": "y"}])
    assert [document.source for document in iterate_documents([str(file)])] == [f"{file}:1", f"{file}:2"]


def test_size_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    assert corpus_bytes([str(tmp_path), str(tmp_path / "a.txt")]) == 10


def refusal(path: Path | str, data: bytes | None = None, key: str = "text") -> str:
    if data is not None:
        Path(path).write_bytes(data)
    with pytest.raises(UserError) as refused:
        texts(path, key=key)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_refused_files(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    assert "does not exist" in refusal(tmp_path / "missing.txt")
    assert "ending is not known" in refusal(tmp_path / "x.docx", b"hello")
    assert "every document is blank" in refusal(file, b" \n ")
    assert f"{file} is not UTF-8 at byte 3" in refusal(file, b"abc\xff")
    assert "NUL byte at byte 2" in refusal(file, b"ab\0")
    (tmp_path / "empty").mkdir()
    assert "no file in it ends in" in refusal(tmp_path / "empty")
    with pytest.raises(UserError, match="no input is given"):
        texts()


def test_refused_json(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    good = b'{"text": "good"}\n'
    assert f"{file}:2 is not JSON" in refusal(file, good + b"{bad\n")
    assert f"{file}:2 is JSON that cannot be read (a number" in refusal(file, good + b"9" * 5000 + b"\n")
    assert f"{file}:2 is JSON that cannot be read (values within" in refusal(file, good + b"[" * 100_000 + b"\n")
    assert f"{file}:2 has no key 'text' (its keys are body)" in refusal(file, good + b'{"body": "x"}\n')
    assert f"{file}:1 has no key 'text' (it is no object)" in refusal(file, b"[1]\n")
    assert "of type int, not a string" in refusal(file, b'{"text": 1}\n')
    assert f"{file}:2 is not UTF-8 at byte {len(good) + 1}" in refusal(file, good + b'"\xff"\n')
    assert "half of a surrogate pair at character 1" in refusal(file, b'{"text": "a\\ud800"}\n')
    assert "not a whole gzip file" in refusal(tmp_path / "x.jsonl.gz", gzip.compress(good * 99)[:30])
    assert "not a whole gzip file" in refusal(tmp_path / "y.jsonl.gz", good)


def test_refused_parquet(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    assert "not a whole parquet file" in refusal(file, b"PAR1 and no more")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), file)
    assert "has no column 'text' (its columns are body)" in refusal(file)
    assert f"{file}:2: 'body' is of type NoneType" in refusal(file, key="body")


def test_standard_library() -> None:
    found = list(standard_library_documents())
    assert found == list(standard_library_documents())
    by_name = {name: text for text, name in found}
    assert len(by_name) == len(found)
    assert by_name["python:stdlib/textwrap.py"] == Path(inspect.getfile(textwrap)).read_text(encoding="utf-8")
    assert "python:stdlib/help/if" in by_name
    assert not any("/test/" in name or "site-packages" in name for name in by_name)
    size = sum(len(text.encode()) for text, _ in found)
    assert size > 5_000_000
    assert abs(corpus_bytes(["python:stdlib"]) - size) < 0.05 * size


def test_standard_library_leaves_out_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1")
    (tmp_path / "b.py").write_bytes(b"# \xff")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_bytes(b"y = 1")
    names = [name for _, name in standard_library_documents(tmp_path) if "/help/" not in name]
    assert names == ["python:stdlib/a.py"]
