"""From text to tokens on disk, with many processes and one result.

The corpus is read twice: first to check all of it, to know its size and to place the split; then to cut it
into tokens. Neither the workers nor their number have any part in the result.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamoe_dist.console import progress
from adamoe_dist.data.corpus import Document, corpus_bytes, iterate_documents, validate_inputs
from adamoe_dist.data.outputs import refuse_existing, require_writable
from adamoe_dist.data.storage import PartInfo, PartWriter, part_files, remove_part, token_dtype
from adamoe_dist.data.tokenizer import Tokenizer
from adamoe_dist.errors import UserError

TRAIN = "train"
VALIDATION = "validation"

_BATCH_BYTES = 1 << 19
_BATCH_DOCUMENTS = 256
_BATCHES_AHEAD = 4
_HASH_RANGE = 1 << 64

Encode = Callable[[list[str]], list[NDArray[Any]]]


@dataclass(frozen=True)
class PreparationSummary:
    """What was written.

    Attributes:
        train: the training part.
        validation: the validation part, where one was asked for.
        seconds: wall-clock time.
    """

    train: PartInfo
    validation: PartInfo | None
    seconds: float


def prepare_corpus(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output_prefix: str | Path,
    *,
    workers: int = 1,
    validation_fraction: float = 0.0,
    seed: int = 0,
    text_key: str = "text",
    overwrite: bool = False,
) -> PreparationSummary:
    """Write ``PREFIX_train`` and, with a validation fraction, ``PREFIX_validation``.

    Each document ends with the tokenizer's end-of-document id. A document goes to one part or the other by
    a seeded hash of its text, so copies of a document never fall on both sides.

    Args:
        inputs: see `iterate_documents`.
        tokenizer: must survive pickling.
        output_prefix: path without the part's name; its directory is made where it is missing.
        workers: processes that cut text; 1 works in this process.
        validation_fraction: expected share of the documents; at least one document goes to each part.
        seed: of the split.
        text_key: see `iterate_documents`.
        overwrite: replace parts that are already there.

    Raises:
        UserError: an input or option is refused; nothing was written.
    """
    started = time.monotonic()
    output = _checked_output(output_prefix, workers, validation_fraction, overwrite)
    validate_inputs(inputs)
    survey = _survey(inputs, text_key, seed)
    threshold = survey.threshold(validation_fraction)
    names = [TRAIN, VALIDATION] if validation_fraction else [TRAIN]
    with ExitStack() as cleanup:
        writers = {}
        for name in names:
            writers[name] = PartWriter(
                f"{output}_{name}",
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                sources=list(inputs),
            )
            cleanup.callback(writers[name].discard)
        with progress(survey.bytes, "B", "tokens") as bar:
            for document, tokens in _tokenised(iterate_documents(inputs, text_key), tokenizer, workers):
                size = len(document.text.encode("utf-8"))
                name = VALIDATION if _hash(document.text, seed) < threshold else TRAIN
                writers[name].add(tokens, size)
                bar.update(size)
        infos = {name: writer.finish() for name, writer in writers.items()}
        remove_part(part_files(f"{output}_{VALIDATION}"))
        for writer in writers.values():
            writer.publish()
    return PreparationSummary(infos[TRAIN], infos.get(VALIDATION), time.monotonic() - started)


def _checked_output(prefix: str | Path, workers: int, fraction: float, overwrite: bool) -> Path:
    if workers < 1:
        raise UserError(f"--workers {workers} is less than 1; give 1 or more")
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"--validation-fraction {fraction} is not in [0, 1); give for example 0.05")
    output = Path(prefix)
    if str(prefix).endswith(os.sep) or output.is_dir():
        raise UserError(f"--output {prefix} is a directory; add a name for the data, such as {output / 'corpus'}")
    refuse_existing([file for name in (TRAIN, VALIDATION) for file in part_files(f"{output}_{name}")], overwrite)
    require_writable(output.parent)
    return output


@dataclass(frozen=True)
class _Survey:
    """Size of the corpus and the range of its documents' hashes."""

    documents: int
    bytes: int
    lowest: int
    highest: int

    def threshold(self, fraction: float) -> int:
        """Return the hash below which a document is for validation; both sides keep a document."""
        if not fraction:
            return 0
        if self.lowest == self.highest:
            raise UserError(
                f"--validation-fraction {fraction} needs two different documents, the input has one; "
                "give more files, or 0 for no validation part"
            )
        return min(max(int(fraction * _HASH_RANGE), self.lowest + 1), self.highest)


def _survey(inputs: Sequence[str], text_key: str, seed: int) -> _Survey:
    documents = size = highest = 0
    lowest = _HASH_RANGE
    with progress(corpus_bytes(inputs), "B", "check") as bar:
        for document in iterate_documents(inputs, text_key):
            length = len(document.text.encode("utf-8"))
            key = _hash(document.text, seed)
            documents, size = documents + 1, size + length
            lowest, highest = min(lowest, key), max(highest, key)
            bar.update(length)
    return _Survey(documents, size, lowest, highest)


def _hash(text: str, seed: int) -> int:
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=key).digest(), "little")


def _encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[Any]]:
    dtype = token_dtype(tokenizer.vocab_size)
    return [np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=dtype) for text in texts]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Document, NDArray[Any]]]:
    """Yield each document with its tokens, in the order of the corpus."""
    if workers == 1:
        encode = partial(_encode_documents, tokenizer)
        for batch in _batches(documents):
            yield from zip(batch, encode([document.text for document in batch]), strict=True)
        return
    pending: deque[tuple[list[Document], Future[list[NDArray[Any]]]]] = deque()
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
    )
    try:
        for batch in _batches(documents):
            pending.append((batch, executor.submit(_work, [document.text for document in batch])))
            if len(pending) >= _BATCHES_AHEAD * workers:
                done, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        while pending:
            done, future = pending.popleft()
            yield from zip(done, future.result(), strict=True)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


# A worker's own copy of the tokenizer, set once when the process starts.
_worker_encode: Encode | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_encode
    _worker_encode = partial(_encode_documents, tokenizer)
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> list[NDArray[Any]]:
    assert _worker_encode is not None
    return _worker_encode(texts)
