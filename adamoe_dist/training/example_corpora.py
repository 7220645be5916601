"""The examples of a fine-tuning run: cut into tokens once, on one process, and then opened by all."""

from pathlib import Path

from adamoe_dist.config import Config
from adamoe_dist.data import (
    BlendedSamples,
    ExampleRules,
    ExampleSamples,
    Tokenizer,
    keep_examples,
    load_examples,
)
from adamoe_dist.errors import UserError
from adamoe_dist.training.corpora import Corpora


def keep_example_corpora(config: Config, corpora: Corpora) -> list[str]:
    """Keep the tokens of opened examples in the run directory, where every rank opens them.

    Returns:
        A line about each file.
    """
    notes = []
    for samples in [*corpora.train.datasets, *corpora.validation]:
        assert isinstance(samples, ExampleSamples)
        keep_examples(samples.store, cache(config))
        counts = samples.store.counts
        note = f"{samples.prefix}: {counts.examples} examples"
        if counts.truncated or counts.skipped:
            note += f", {counts.truncated} of them truncated; {counts.skipped} skipped (finetune.too_long="
            note += f"{config.finetune.too_long}, model.sequence_length={config.model.sequence_length})"
        notes.append(note)
    return notes


def open_example_corpora(config: Config) -> Corpora:
    """Open the tokenizer and the examples.

    Raises:
        UserError: a file is missing or a line of it cannot be used, or there are too few examples for one batch.
    """
    tokenizer = Tokenizer.load(config.data.tokenizer)
    config.padded_vocab_size(tokenizer.vocab_size)  # refuses a tokenizer with more ids than the embedding has rows
    length, seed, settings = config.model.sequence_length, config.run.seed, config.finetune

    def opened(path: str, shuffle: bool) -> ExampleSamples:
        store = load_examples(path, tokenizer, rules(config), cache(config))
        return ExampleSamples(path, store, length, seed, tokenizer.fingerprint, settings.packing, shuffle)

    train = [opened(entry["path"], True) for entry in config.data.train]
    validation = [opened(entry["path"], False) for entry in config.data.validation]
    samples = sum(len(dataset) for dataset in train)
    if samples < config.train.global_batch_size:
        raise UserError(
            f"data.train holds {samples} samples, not enough for one batch of train.global_batch_size="
            f"{config.train.global_batch_size}; add examples, lower it, or set finetune.packing=false if it is true"
        )
    weights = [float(entry.get("weight", 1.0)) for entry in config.data.train]
    return Corpora(tokenizer, BlendedSamples(train, weights, seed), validation)


def rules(config: Config) -> ExampleRules:
    """Return what decides how the run's examples become tokens."""
    settings = config.finetune
    return ExampleRules(config.model.sequence_length + 1, settings.too_long, settings.loss_on == "all")


def cache(config: Config) -> Path:
    """Return where the tokens of a run's examples are kept."""
    return config.run_dir / "examples"
