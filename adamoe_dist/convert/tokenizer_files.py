"""The files of a Hugging Face model that are not weights: tokenizer, configuration, licence, code of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from adamoe_dist.convert.safetensors_files import read_json
from adamoe_dist.errors import UserError

TOKENIZER_FILES = frozenset(
    [
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "tokenizer_info.json",
        "vocab.json",
    ]
)
_KEPT = TOKENIZER_FILES | {"config.json", "generation_config.json"}


def kept_files(directory: Path) -> list[Path]:
    """Return the files that conversion keeps, in the order of their names."""
    return [
        file
        for file in sorted(directory.iterdir())
        if file.is_file()
        and (file.name in _KEPT or file.suffix == ".py" or file.name.upper().startswith(("LICENSE", "NOTICE")))
    ]


def has_tokenizer(directory: Path) -> bool:
    """Tell whether a directory holds a tokenizer that transformers can load."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def count_ids(directory: Path) -> int | None:
    """Return one more than the largest id of a directory's tokenizer, from its files; None: it has none.

    Raises:
        UserError: a file of it cannot be read.
    """
    ids = [*_ids_of_vocabulary(directory), *_ids_of_added(directory)]
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
