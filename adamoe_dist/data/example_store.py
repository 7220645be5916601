"""Token ids of a JSONL file's examples: cut once, kept in a directory, and mapped into memory by every rank."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adamoe_dist.data.example_tokens import ExampleTokens, tokens_of_example
from adamoe_dist.data.examples import read_examples, require_file
from adamoe_dist.data.storage import entropy
from adamoe_dist.data.tokenizer import Tokenizer
from adamoe_dist.errors import UserError

FORMAT_VERSION = 2
TooLong = Literal["refuse", "truncate", "skip"]


@dataclass(frozen=True)
class ExampleRules:
    """What decides how examples become tokens, besides file and tokenizer."""

    most_tokens: int
    """Of one example: ``model.sequence_length`` + 1."""
    too_long: TooLong = "refuse"
    on_all: bool = False


@dataclass(frozen=True)
class ExampleCounts:
    """What became of a file's examples.

    Attributes:
        examples: those that are used.
        truncated: of these, how many lost their ends.
        skipped: those that are too long and are not used, or have no token to learn from once truncated.
        target_bytes: UTF-8 bytes of the text that the loss is of.
        target_entropy: entropy of the frequencies of the tokens that the loss is of, in nats.
    """

    examples: int
    truncated: int
    skipped: int
    target_bytes: int
    target_entropy: float


@dataclass(frozen=True, eq=False)
class ExampleStore:
    """All examples of a file, one after the other.

    Attributes:
        name: of the directory that keeps them.
        ids: int32 (tokens,).
        targets: bool (tokens,), true where the loss is of the token; never of an example's first.
        ends: int64 (examples,), where each example ends.
        counts: what became of the file's lines.
        eod_id: of the tokenizer.
    """

    name: str
    ids: NDArray[np.int32]
    targets: NDArray[np.bool_]
    ends: NDArray[np.int64]
    counts: ExampleCounts
    eod_id: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example (examples,)."""
        return np.diff(self.ends, prepend=0)

    def fingerprint(self) -> str:
        """Hexadecimal digest of the tokens, their targets and where examples end."""
        digest = hashlib.sha256(str(self.eod_id).encode())
        for array in (self.ids, self.targets, self.ends):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_examples(path: str, tokenizer: Tokenizer, rules: ExampleRules, cache: Path | None = None) -> ExampleStore:
    """Return the examples of a JSONL file: those kept in ``cache`` where they are there, else cut here and now.

    Raises:
        UserError: the file or a line cannot be used, or no example is left.
    """
    require_file(path)
    name = _name(path, tokenizer, rules)
    if cache is not None and (cache / name).is_dir():
        return _read(cache / name)
    return _cut(path, name, tokenizer, rules)


def keep_examples(store: ExampleStore, cache: Path) -> None:
    """Write examples where :func:`load_examples` finds them, unless they are there; on one process only."""
    place = cache / store.name
    if place.is_dir():
        return
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name in ("ids", "targets", "ends"):
            np.save(partial / f"{name}.npy", getattr(store, name))
        description = {"counts": asdict(store.counts), "eod_id": store.eod_id}
        (partial / "info.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _name(path: str, tokenizer: Tokenizer, rules: ExampleRules) -> str:
    """Return a name that says all that a file's tokens follow from."""
    with Path(path).open("rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    parts = (FORMAT_VERSION, content, tokenizer.fingerprint, tokenizer.chat_template, *asdict(rules).values())
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:24]


def _read(place: Path) -> ExampleStore:
    arrays: dict[str, Any] = {
        name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ("ids", "targets", "ends")
    }
    description = json.loads((place / "info.json").read_text(encoding="utf-8"))
    counts = ExampleCounts(**description["counts"])
    return ExampleStore(place.name, **arrays, counts=counts, eod_id=description["eod_id"])


def _cut(path: str, name: str, tokenizer: Tokenizer, rules: ExampleRules) -> ExampleStore:
    ids: list[NDArray[np.int32]] = []
    targets: list[NDArray[np.bool_]] = []
    target_bytes = truncated = skipped = 0
    for example in read_examples(path):
        tokens = tokens_of_example(example, tokenizer, rules.on_all)
        is_long = len(tokens.ids) > rules.most_tokens
        if is_long and rules.too_long == "refuse":
            raise UserError(
                f"{example.source} has {len(tokens.ids)} tokens, more than model.sequence_length + 1 = "
                f"{rules.most_tokens}; raise model.sequence_length, or set finetune.too_long to truncate or skip"
            )
        kept = ExampleTokens(tokens.ids[: rules.most_tokens], tokens.targets[: rules.most_tokens])
        if (is_long and rules.too_long == "skip") or not any(kept.targets[1:]):
            if not is_long:
                raise UserError(f"{example.source} has no token to learn from; mend or remove the line")
            skipped += 1
            continue
        truncated += is_long
        ids.append(np.asarray(kept.ids, dtype=np.int32))
        targets.append(np.asarray([False, *kept.targets[1:]]))
        text = tokenizer.decode([i for i, t in zip(kept.ids, kept.targets, strict=True) if t and i != tokenizer.eod_id])
        target_bytes += len(text.encode())
    if not ids:
        raise UserError(
            f"data {path}: every example is longer than model.sequence_length + 1 = {rules.most_tokens} tokens and "
            "nothing is left; raise model.sequence_length"
        )
    all_ids, all_targets = np.concatenate(ids), np.concatenate(targets)
    counts = ExampleCounts(
        len(ids), truncated, skipped, target_bytes, entropy(np.bincount(all_ids[all_targets]).astype(np.int64))
    )
    ends = np.cumsum([len(part) for part in ids]).astype(np.int64)
    return ExampleStore(name, all_ids, all_targets, ends, counts, tokenizer.eod_id)
