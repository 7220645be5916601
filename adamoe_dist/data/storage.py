"""One part of a prepared corpus on disk: Megatron's ``.bin`` and ``.idx``, and a ``.json`` about them.

The ``.json`` is put in place last: a part without it is not complete.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamoe_dist.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PartInfo:
    """What the ``.json`` says of a part.

    Attributes:
        format_version: of this description.
        tokenizer_fingerprint: of the tokenizer that cut the text.
        vocab_size: of that tokenizer.
        eod_id: the id at the end of every document.
        documents: number of documents.
        tokens: number of tokens, end-of-document ids included.
        bytes: UTF-8 bytes of the text.
        unigram_entropy: entropy of the part's own token frequencies, in nats a token; what a model that
            knows only frequencies would reach as its loss.
        content_sha256: digest of the document lengths and tokens.
        sources: the inputs as they were given.
    """

    format_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int
    documents: int
    tokens: int
    bytes: int
    unigram_entropy: float
    content_sha256: str
    sources: list[str]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the tokens, the documents' lengths and the tokenizer; not of file names."""
        parts = f"{self.content_sha256}:{self.tokenizer_fingerprint}:{self.eod_id}"
        return hashlib.sha256(parts.encode()).hexdigest()


def part_files(prefix: str | Path) -> tuple[Path, Path, Path]:
    """Return the ``.bin``, ``.idx`` and ``.json`` files of a part."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def read_info(prefix: str | Path) -> PartInfo:
    """Read and check the description of a part.

    Raises:
        UserError: a file of the part is missing, or the description is of another version or damaged.
    """
    again = "prepare it again with tools/prepare_data.py"
    for file in part_files(prefix):
        if not file.is_file():
            raise UserError(_missing_part(Path(prefix), file))
    file = part_files(prefix)[2]
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {again}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{file} has format_version {version}, this program reads {FORMAT_VERSION}; {again}")
    names = {field.name for field in fields(PartInfo)}
    if names != set(content):
        odd = ", ".join(sorted(names ^ set(content)))
        raise UserError(f"{file} has missing or unknown keys ({odd}); {again}")
    return PartInfo(**content)


def _missing_part(prefix: Path, file: Path) -> str:
    if Path(f"{prefix}_train.json").is_file():
        return f"data {prefix}: there is no {file}; did you mean {prefix}_train?"
    base = prefix.with_name(prefix.name.removesuffix("_train").removesuffix("_validation"))
    return (
        f"data {prefix}: there is no {file}; make it with "
        f"tools/prepare_data.py --input PATH --tokenizer DIR --output {base}"
    )


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the type that a part's tokens are stored in: Megatron's choice for the vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence Megatron, which warns of missing accelerator packages and of a missing process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def megatron_indexed_dataset() -> ModuleType:
    """Import Megatron's module of indexed datasets, which takes seconds, without its warnings."""
    with _without_warnings():
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def open_tokens(prefix: str | Path, info: PartInfo) -> Any:
    """Memory-map a part.

    Returns:
        Megatron's ``IndexedDataset``, one sequence a document.

    Raises:
        UserError: the files do not agree with ``info``.
    """
    bin_file, idx_file, _ = part_files(prefix)
    megatron = megatron_indexed_dataset()
    itemsize = np.dtype(token_dtype(info.vocab_size)).itemsize
    # Header (34 bytes), then length, pointer and document index of every document and one more index.
    expected = {bin_file: info.tokens * itemsize, idx_file: 34 + 20 * info.documents + 8}
    for file, size in expected.items():
        if file.stat().st_size != size:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes, its .json says {size}; "
                "prepare it again with tools/prepare_data.py"
            )
    with _without_warnings():
        return megatron.IndexedDataset(str(prefix), mmap=True)


class PartWriter:
    """Writes a part under temporary names; `publish` gives them their own."""

    def __init__(
        self,
        prefix: str | Path,
        *,
        tokenizer_fingerprint: str,
        vocab_size: int,
        eod_id: int,
        sources: list[str],
    ) -> None:
        megatron = megatron_indexed_dataset()
        self._files = part_files(prefix)
        self._partial = tuple(file.with_name(f".{file.name}.{os.getpid()}.partial") for file in self._files)
        dtype = token_dtype(vocab_size)
        self._builder = megatron.IndexedDatasetBuilder(str(self._partial[0]), dtype=dtype)
        self._digest = hashlib.sha256(np.dtype(dtype).str.encode())
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._vocab_size = vocab_size
        self._eod_id = eod_id
        self._sources = sources
        self.documents = 0
        self.bytes = 0

    def add(self, tokens: NDArray[Any], text_bytes: int) -> None:
        """Append a document.

        Args:
            tokens: shape (T,), of the part's own type, with the end-of-document id.
            text_bytes: UTF-8 bytes of its text.
        """
        self._builder.add_document(tokens, [len(tokens)])
        self._digest.update(len(tokens).to_bytes(8, "little"))
        self._digest.update(tokens.tobytes())
        self._counts += np.bincount(tokens, minlength=self._vocab_size)
        self.documents += 1
        self.bytes += text_bytes

    def finish(self) -> PartInfo:
        """Write everything out, still under temporary names."""
        self._builder.finalize(str(self._partial[1]))
        info = PartInfo(
            format_version=FORMAT_VERSION,
            tokenizer_fingerprint=self._tokenizer_fingerprint,
            vocab_size=self._vocab_size,
            eod_id=self._eod_id,
            documents=self.documents,
            tokens=int(self._counts.sum()),
            bytes=self.bytes,
            unigram_entropy=entropy(self._counts),
            content_sha256=self._digest.hexdigest(),
            sources=self._sources,
        )
        self._partial[2].write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
        return info

    def publish(self) -> None:
        """Put the finished files in place; an older part is taken apart before."""
        remove_part(self._files)
        for partial, file in zip(self._partial, self._files, strict=True):
            partial.replace(file)

    def discard(self) -> None:
        """Remove what is left under temporary names."""
        self._builder.data_file.close()
        for partial in self._partial:
            partial.unlink(missing_ok=True)


def remove_part(files: tuple[Path, Path, Path]) -> None:
    """Remove a part, its description first, so that it never looks complete on the way."""
    for file in reversed(files):
        file.unlink(missing_ok=True)


def entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy of a frequency table in nats; 0 for an empty one.

    Args:
        counts: shape (vocabulary,).
    """
    seen = counts[counts > 0].astype(np.float64)
    total = float(seen.sum())
    return math.log(total) - float((seen * np.log(seen)).sum()) / total if total else 0.0
