"""Section ``data``: prepared text, its blend, its tokenizer."""

from dataclasses import dataclass
from typing import Any

from adamoe_dist.config.fields import key, section


@dataclass(kw_only=True)
class PrepareConfig:
    """What to prepare first where the tokenizer or the data files are missing."""

    input: list[str] = key(
        [],
        "Texts to prepare where data is missing (files, directories, python:stdlib); empty: refuse instead.",
    )
    vocab_size: int = key(4096, "Vocabulary of the tokenizer that is trained where it is missing.", at_least=1)
    validation_fraction: float = key(0.02, "Part of the documents kept for validation.", at_least=0, below=1)
    workers: int | None = key(None, "Processes that tokenize; null: one per core.", at_least=1)


@dataclass(kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    train: list[dict[str, Any]] = key(
        [], "Training sets: a list of {path: PREFIX of PREFIX.bin/.idx, weight: share of the samples}."
    )
    validation: list[dict[str, Any]] = key([], "Validation sets, in the same form; weights are ignored; may be empty.")
    tokenizer: str = key(
        "",
        "Tokenizer that prepared the data: a directory (of train_tokenizer.py, or in Hugging Face's format with "
        "tokenizer.json), or a SentencePiece .model file.",
    )
    prepare: PrepareConfig = section(PrepareConfig, "Preparation of missing data.")
