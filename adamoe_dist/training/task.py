"""What pre-training and fine-tuning do differently: where the configuration and the samples come from."""

from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from adamoe_dist.config import (
    Config,
    check_fine_tuning,
    check_pre_training,
    config_from_dict,
    load_config,
    profile_steps_problem,
    read_values,
    schedule_problem,
)
from adamoe_dist.errors import UserError
from adamoe_dist.training.corpora import Corpora, is_to_be_prepared, open_corpora, prepare_missing
from adamoe_dist.training.example_corpora import keep_example_corpora, open_example_corpora
from adamoe_dist.training.starting_point import (
    check_trained_weights,
    router_in_effect,
    starting_checkpoint,
    with_model_of,
)

_FROM_EPOCHS = ("train.steps", "moe.router.balance.anneal_steps")


class Task(Protocol):
    """A training command's own part."""

    def configure(self, path: Path, overrides: list[str]) -> Config:
        """Return the tree of a configuration file and overrides.

        Raises:
            UserError: it cannot be read, or is not one that this command can run.
        """

    def prepare(self, config: Config) -> None:
        """Make what the run reads and is missing, on one process only.

        Raises:
            UserError: it cannot be made.
        """

    def open(self, config: Config) -> Corpora:
        """Open the run's data, and set the keys of ``config`` that follow from it.

        Raises:
            UserError: it cannot be opened, or keys contradict it.
        """

    def look(self, config: Config) -> Corpora | None:
        """Do what :meth:`open` does without preparing anything; None where the data is still to be prepared.

        Raises:
            UserError: it cannot be opened or prepared, or keys contradict it.
        """

    def keep(self, config: Config, corpora: Corpora) -> list[str]:
        """Keep in the run directory what other ranks need to open the data, once nothing is left that may be refused.

        On one process only.

        Returns:
            What is to be said of the run's model and data, a line each.
        """

    def complete(self, config: Config) -> None:
        """Set the keys that follow from the data without preparing anything; for a run that is not started."""


class PreTraining:
    """On prepared text."""

    def configure(self, path: Path, overrides: list[str]) -> Config:
        """See :class:`Task`."""
        config = load_config(path, overrides)
        check_pre_training(config)
        return config

    def prepare(self, config: Config) -> None:
        """See :class:`Task`."""
        prepare_missing(config)

    def open(self, config: Config) -> Corpora:
        """See :class:`Task`."""
        return open_corpora(config)

    def look(self, config: Config) -> Corpora | None:
        """See :class:`Task`."""
        return None if is_to_be_prepared(config) else open_corpora(config)

    def keep(self, config: Config, corpora: Corpora) -> list[str]:
        """See :class:`Task`."""
        return []

    def complete(self, config: Config) -> None:
        """See :class:`Task`."""


class FineTuning:
    """On examples, from the model of a checkpoint."""

    def __init__(self) -> None:
        self._asked: dict[str, Any] = {}
        self._notes: list[str] = []

    def configure(self, path: Path, overrides: list[str]) -> Config:
        """See :class:`Task`; the model is the checkpoint's where the configuration does not say otherwise."""
        values = read_values(path, overrides)
        config = config_from_dict(values)
        check_fine_tuning(config)
        source = starting_checkpoint(config)
        for key in _FROM_EPOCHS:
            self._asked[key] = _given(values, *key.split("."))
        values, self._notes = with_model_of(source, values)
        config = config_from_dict(values)
        check_fine_tuning(config)
        check_trained_weights(source, config)
        return config

    def prepare(self, config: Config) -> None:
        """See :class:`Task`."""

    def open(self, config: Config) -> Corpora:
        """See :class:`Task`."""
        corpora = open_example_corpora(config)
        self._set_steps(config, sum(len(dataset) for dataset in corpora.train.datasets))
        return corpora

    def look(self, config: Config) -> Corpora | None:
        """See :class:`Task`."""
        return self.open(config)

    def keep(self, config: Config, corpora: Corpora) -> list[str]:
        """See :class:`Task`."""
        return [*self._notes, router_in_effect(config), *keep_example_corpora(config, corpora)]

    def complete(self, config: Config) -> None:
        """See :class:`Task`."""
        if config.finetune.epochs is not None or config.finetune.anneal_epochs is not None:
            self.open(config)

    def _set_steps(self, config: Config, samples: int) -> None:
        settings, balance = config.finetune, config.moe.router.balance
        if settings.epochs is not None:
            config.train.steps = self._steps(config, samples, "epochs", settings.epochs, _FROM_EPOCHS[0])
        if settings.anneal_epochs is not None:
            steps = self._steps(config, samples, "anneal_epochs", settings.anneal_epochs, _FROM_EPOCHS[1])
            balance.anneal_steps = steps
        if config.checkpoint.resume == "none" and (problem := schedule_problem(config)):
            raise UserError(problem)
        if problem := profile_steps_problem(config):
            raise UserError(problem)

    def _steps(self, config: Config, samples: int, name: str, epochs: float, key: str) -> int:
        steps = steps_of_epochs(epochs, samples, config.train.global_batch_size)
        asked = self._asked.get(key)
        if asked is not None and asked != steps:
            raise UserError(
                f"{key}={asked} and finetune.{name}={epochs:g} contradict each other: {samples} samples an epoch in "
                f"batches of {config.train.global_batch_size} are {steps} steps; set finetune.{name}=null or remove "
                f"{key}"
            )
        return steps


def steps_of_epochs(epochs: float, samples: int, batch: int) -> int:
    """Return the steps after which so many passes over ``samples`` samples are complete."""
    return ceil(Fraction(repr(float(epochs))) * samples / batch)


def _given(values: Any, *path: str) -> Any:
    """Return what a tree of raw values says under a key, or None where it says nothing."""
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values
