"""The data of a run: prepared first where it is missing and may be, then opened and checked."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adamoe_dist.config import Config
from adamoe_dist.data import (
    BlendedSamples,
    Dataset,
    TokenDataset,
    Tokenizer,
    iterate_documents,
    prepare_corpus,
    train_tokenizer,
    validate_inputs,
)
from adamoe_dist.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpora:
    """What a run reads."""

    tokenizer: Tokenizer
    train: BlendedSamples
    validation: Sequence[Dataset]


def is_to_be_prepared(config: Config) -> bool:
    """Tell whether files of the run are missing that :func:`prepare_missing` makes.

    Raises:
        UserError: the texts that it would make them from cannot be used.
    """
    texts = config.data.prepare.input
    if not texts or (Path(config.data.tokenizer).exists() and Path(f"{_prefix(config)}_train.json").is_file()):
        return False
    validate_inputs(texts)
    return True


def _prefix(config: Config) -> str:
    return str(config.data.train[0]["path"]).removesuffix("_train")


def prepare_missing(config: Config) -> None:
    """Train the tokenizer and cut the text of ``data.prepare.input`` where the run's files are missing.

    Call it on one process only. Without ``data.prepare.input`` it does nothing, and opening the data says what is
    missing.

    Raises:
        UserError: the texts cannot be used.
    """
    if not is_to_be_prepared(config):
        return
    settings, base = config.data.prepare, _prefix(config)
    if not Path(config.data.tokenizer).exists():
        logger.info("data.tokenizer=%s is missing: training it on %s", config.data.tokenizer, settings.input)
        summary = train_tokenizer(iterate_documents(settings.input), settings.vocab_size, config.data.tokenizer)
        logger.info("tokenizer: %s", summary)
    if not Path(f"{base}_train.json").is_file():
        logger.info("data.train=%s_train is missing: preparing it from %s", base, settings.input)
        prepared = prepare_corpus(
            settings.input,
            Tokenizer.load(config.data.tokenizer),
            base,
            workers=settings.workers or len(os.sched_getaffinity(0)),
            validation_fraction=settings.validation_fraction,
        )
        logger.info("prepared %d training tokens in %.0f s", prepared.train.tokens, prepared.seconds)


def open_corpora(config: Config) -> Corpora:
    """Open the tokenizer and every data set, and check that they belong together.

    Raises:
        UserError: a file is missing or damaged, the tokenizer is not the one that made the data, or there is not enough
            data for one batch.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    config.padded_vocab_size(tokenizer.vocab_size)  # refuses a tokenizer with more ids than the embedding has rows
    length, seed = config.model.sequence_length, config.run.seed
    train = [TokenDataset(entry["path"], length, seed) for entry in config.data.train]
    validation = [TokenDataset(entry["path"], length, seed, shuffle=False) for entry in config.data.validation]
    for name, datasets in (("train", train), ("validation", validation)):
        for number, dataset in enumerate(datasets):
            _check_tokenizer(f"data.{name}[{number}]", dataset, tokenizer, config.data.tokenizer)
    samples = sum(len(dataset) for dataset in train)
    if samples < config.train.global_batch_size:
        raise UserError(
            f"data.train holds {samples} samples of model.sequence_length={length} tokens, not enough for one batch of "
            f"train.global_batch_size={config.train.global_batch_size}; add text or lower one of the two"
        )
    weights = [float(entry.get("weight", 1.0)) for entry in config.data.train]
    return Corpora(tokenizer, BlendedSamples(train, weights, seed), validation)


def _check_tokenizer(key: str, dataset: TokenDataset, tokenizer: Tokenizer, path: str) -> None:
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key} was prepared with another tokenizer ({dataset.tokenizer_fingerprint[:12]}) than data.tokenizer="
            f"{path} ({tokenizer.fingerprint[:12]}); name the one that prepared it, or prepare the data again"
        )
