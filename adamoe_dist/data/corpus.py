"""Documents of text from files, directories and the standard library of Python.

Every input is read in a fixed order (the order given; inside a directory by name), so that two runs see
the same documents in the same order.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from adamoe_dist.data.standard_library import (
    STANDARD_LIBRARY,
    standard_library_bytes,
    standard_library_documents,
)
from adamoe_dist.errors import UserError

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
JSON_ENDINGS = (".jsonl", ".jsonl.gz")
PARQUET_ENDINGS = (".parquet",)
KNOWN_ENDINGS = TEXT_ENDINGS + JSON_ENDINGS + PARQUET_ENDINGS

_PARQUET_BATCH_ROWS = 1024


class Document(NamedTuple):
    """One document and where it came from (``file``, ``file:line`` or ``file:row``)."""

    text: str
    source: str


def iterate_documents(inputs: Sequence[str], text_key: str = "text") -> Iterator[Document]:
    """Yield the documents of all inputs in order; blank ones are left out.

    Args:
        inputs: files, directories (searched recursively for the known endings; names that begin with a
            dot are left out) or ``python:stdlib``. A text file is one document.
        text_key: the JSON field or parquet column that holds the text.

    Raises:
        UserError: an input is missing, unreadable or of an unknown kind, or no document has any text.
    """
    validate_inputs(inputs)
    found = False
    for name in inputs:
        for document in _documents_of_input(name, text_key):
            if document.text and not document.text.isspace():
                found = True
                yield document
    if not found:
        raise UserError(f"input {_listing(inputs)} holds no text: every document is blank; give other files")


def validate_inputs(inputs: Sequence[str]) -> None:
    """Check that every input exists and is of a known kind, without reading any text.

    Raises:
        UserError: naming the first input that cannot be read.
    """
    if not inputs:
        raise UserError("no input is given; give files, directories or python:stdlib")
    for name in inputs:
        if name != STANDARD_LIBRARY:
            _files_of_input(name)


def corpus_bytes(inputs: Sequence[str]) -> int:
    """Return the size of the inputs on disk in bytes; compressed files count as they are."""
    total = 0
    for name in inputs:
        if name == STANDARD_LIBRARY:
            total += standard_library_bytes()
        else:
            total += sum(path.stat().st_size for path in _files_of_input(name))
    return total


def _listing(inputs: Sequence[str]) -> str:
    return ", ".join(inputs[:3]) + (" ..." if len(inputs) > 3 else "")


def _documents_of_input(name: str, text_key: str) -> Iterator[Document]:
    if name == STANDARD_LIBRARY:
        for text, source in standard_library_documents():
            yield Document(text, source)
        return
    for path in _files_of_input(name):
        yield from _documents_of_file(path, text_key)


def _files_of_input(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = [file for file in _walk(path) if _ending(file)]
        if not files:
            raise UserError(f"input {name}: no file in it ends in {' '.join(KNOWN_ENDINGS)}; add some text")
        return files
    if not path.exists():
        raise UserError(f"input {name} does not exist; give a file, a directory or {STANDARD_LIBRARY}")
    if not _ending(path):
        raise UserError(f"input {name}: its ending is not known; rename it to one of {' '.join(KNOWN_ENDINGS)}")
    return [path]


def _walk(directory: Path) -> list[Path]:
    relative = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    visible = (path for path in relative if not any(part.startswith(".") for part in path.parts))
    return [directory / name for name in sorted(path.as_posix() for path in visible)]


def _ending(path: Path) -> str | None:
    name = path.name.lower()
    return next((ending for ending in KNOWN_ENDINGS if name.endswith(ending)), None)


def _documents_of_file(path: Path, text_key: str) -> Iterator[Document]:
    ending = _ending(path)
    try:
        if ending in PARQUET_ENDINGS:
            yield from _parquet_documents(path, text_key)
        elif ending == ".jsonl.gz":
            yield from _gzip_documents(path, text_key)
        elif ending in JSON_ENDINGS:
            with path.open("rb") as stream:
                yield from _json_documents(stream, path, text_key)
        else:
            yield Document(decode_text(path.read_bytes(), str(path)), str(path))
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); change its permissions") from error


def decode_text(data: bytes, where: str, offset: int = 0) -> str:
    """Decode UTF-8 text, without the byte-order mark of a file; ``offset`` is the position of ``data`` in its file."""
    zero = data.find(b"\0")
    if zero >= 0:
        raise UserError(
            f"{where} is not text: it has a NUL byte at byte {offset + zero}; give text in UTF-8 or leave it out"
        )
    try:
        return data.decode("utf-8").removeprefix("" if offset else "\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {offset + error.start}; convert it (iconv -t UTF-8) or leave it out"
        ) from error


def parse_json(line: str, where: str) -> Any:
    """Return the value of one line of JSON.

    Raises:
        UserError: it is none, or not one that can be read; ``where`` is named.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}); mend or remove the line") from error
    except (ValueError, RecursionError) as error:
        reason = "values within values too deep" if isinstance(error, RecursionError) else "a number of too many digits"
        raise UserError(f"{where} is JSON that cannot be read ({reason}); mend or remove the line") from error


def _gzip_documents(path: Path, text_key: str) -> Iterator[Document]:
    try:
        with gzip.open(path, "rb") as stream:
            yield from _json_documents(stream, path, text_key)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); make or fetch it again") from error


def _json_documents(stream: BinaryIO | gzip.GzipFile, path: Path, text_key: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        where = f"{path}:{number}"
        text = decode_text(line, where, offset)
        offset += len(line)
        if text.strip():
            yield Document(_json_text(text, where, text_key), where)


def _json_text(line: str, where: str, text_key: str) -> str:
    record = parse_json(line, where)
    if not isinstance(record, dict) or text_key not in record:
        keys = f"its keys are {', '.join(sorted(record))}" if isinstance(record, dict) else "it is no object"
        raise UserError(f"{where} has no key {text_key!r} ({keys}); name the text's key with --text-key")
    return _checked_text(record[text_key], where, text_key)


def _checked_text(value: Any, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {text_key!r} is of type {type(value).__name__}, not a string; "
            "mend it, or name another with --text-key"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {text_key!r} has half of a surrogate pair at character {error.start}; mend the text"
        ) from error
    return value


def _parquet_documents(path: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise UserError(
                    f"{path} has no column {text_key!r} (its columns are {', '.join(columns)}); "
                    "name the text's column with --text-key"
                )
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}:{row}"
                    yield Document(_checked_text(value, where, text_key), where)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); make or fetch it again") from error
