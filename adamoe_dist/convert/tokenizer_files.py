"""The files of a Hugging Face model that are not weights: tokenizer, configuration, card, licence, code of its own."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from adamoe_dist.convert.safetensors_files import read_json
from adamoe_dist.data import TOKENIZER_FILES
from adamoe_dist.errors import UserError

_OTHERS = frozenset(
    [
        "README.md",
        "README_original.md",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tekken.json",
        "tokenizer.model.v3",
        "tokenizer_info.json",
    ]
)
TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""What names of files with terms of use begin with, in capitals."""

_TEMPLATES = "additional_chat_templates"


def kept_files(directory: Path) -> list[str]:
    """Return the names of the files that conversion keeps, relative to their directory, in order."""
    names = [file.name for file in directory.iterdir() if file.is_file() and _is_kept(file)]
    return sorted([*names, *(f"{_TEMPLATES}/{file.name}" for file in (directory / _TEMPLATES).glob("*.jinja"))])


def _is_kept(file: Path) -> bool:
    is_named = file.name in TOKENIZER_FILES or file.name in _OTHERS
    return is_named or file.suffix == ".py" or file.name.upper().startswith(TERMS)


def left_behind(directory: Path, weights: Collection[str]) -> list[str]:
    """Return what of a directory conversion does not keep, directories with a slash.

    Args:
        directory: of the model.
        weights: names of the files that tensors are read from, and of their index.
    """
    kept = {*kept_files(directory), *weights}
    entries = [*directory.iterdir(), *(directory / _TEMPLATES).glob("*")]
    names = [entry.relative_to(directory).as_posix() + ("/" if entry.is_dir() else "") for entry in entries]
    return sorted(name for name in names if name not in {*kept, f"{_TEMPLATES}/"})


def has_tokenizer(directory: Path) -> bool:
    """Tell whether a directory holds a tokenizer that transformers can load."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def count_ids(directory: Path) -> int | None:
    """Return one more than the largest id of a directory's tokenizer, from its files; None: it has none.

    Raises:
        UserError: a file of it cannot be read.
    """
    try:
        ids = [*_ids_of_vocabulary(directory), *_ids_of_added(directory)]
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(
            f"{directory}: its tokenizer's files are not as transformers writes them ({problem!r})"
        ) from problem
    return max(ids) + 1 if ids else None


def _ids_of_vocabulary(directory: Path) -> Iterator[int]:
    whole, pieces, words = (directory / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if whole.is_file():
        content = read_json(whole)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        yield from _values(vocabulary, whole) if isinstance(vocabulary, dict) else range(len(vocabulary))
        yield from (int(token["id"]) for token in content.get("added_tokens") or [])
    elif pieces.is_file():
        try:
            yield sentencepiece.SentencePieceProcessor(model_file=str(pieces)).vocab_size() - 1
        except (RuntimeError, OSError) as problem:
            raise UserError(f"{pieces} is not a SentencePiece model; fetch it again") from problem
    elif words.is_file():
        yield from _values(read_json(words), words)


def _ids_of_added(directory: Path) -> Iterator[int]:
    """Ids beside the vocabulary; transformers reads these files too."""
    added, settings = directory / "added_tokens.json", directory / "tokenizer_config.json"
    if added.is_file():
        yield from _values(read_json(added), added)
    if settings.is_file():
        decoder = read_json(settings).get("added_tokens_decoder")
        yield from (int(number) for number in decoder or {})


def _values(vocabulary: dict[str, Any], file: Path) -> Iterator[int]:
    for token, number in vocabulary.items():
        if type(number) is not int:
            raise UserError(f"{file}: the id of {token!r} is {number!r}, not a number; fetch it again")
        yield number
