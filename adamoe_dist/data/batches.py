"""Batches of this rank: which samples of the endless sequence it trains on, and how far the run has come."""

from collections.abc import Iterator
from typing import Any

import torch

from adamoe_dist.data.blend import BlendedSamples, Dataset, Samples
from adamoe_dist.data.micro_batch import MicroBatch
from adamoe_dist.errors import UserError

_AFRESH = "or start afresh with checkpoint.load_weights"


class BatchStream:
    """The micro-batches of one data-parallel rank, step after step.

    Step t uses the G samples after those of step t - 1. Micro-batch q of a step (q = 0 .. G / micro - 1)
    holds ``micro`` samples in a row, and rank r of R takes q = a R + r for a = 0, 1 ... So the samples of a
    step depend neither on R nor on the micro-batch size.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        may_be_other_samples: bool = False,
    ) -> None:
        """Start after ``consumed_samples`` samples; sizes are in samples and G must divide evenly.

        With ``may_be_other_samples`` :meth:`load_state_dict` accepts the position in another blend.
        """
        assert global_batch_size % (micro_batch_size * data_parallel_size) == 0
        assert 0 <= data_parallel_rank < data_parallel_size
        self._samples = samples
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._ranks = data_parallel_size
        self.consumed_samples = consumed_samples
        self._may_be_other_samples = may_be_other_samples

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of this rank in one step."""
        return self._global_batch_size // (self._micro_batch_size * self._ranks)

    def next_step(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step, of ``micro`` samples each."""
        batches = []
        for accumulation in range(self.accumulation_steps):
            micro_batch = accumulation * self._ranks + self._rank
            start = self.consumed_samples + micro_batch * self._micro_batch_size
            batches.append(MicroBatch.of([self._samples[start + offset] for offset in range(self._micro_batch_size)]))
        self.consumed_samples += self._global_batch_size
        return batches

    def describe(self, first_sample: int) -> str:
        """Name the batch of the step that begins at ``first_sample``: its samples, and which of each dataset's own."""
        last = first_sample + self._global_batch_size - 1
        words = f"samples {first_sample} to {last} of the data order"
        if not isinstance(self._samples, BlendedSamples):
            return words
        own: dict[int, list[int]] = {}
        for sample in range(first_sample, last + 1):
            dataset, index = self._samples.locate(sample)
            own.setdefault(dataset, []).append(index)
        parts = (f"{self._samples.datasets[d].prefix} {min(own[d])} to {max(own[d])}" for d in sorted(own))
        return f"{words} ({', '.join(parts)})"

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is a position in; plain values, the same on every rank."""
        return {"consumed_samples": self.consumed_samples, **self._samples.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stopped, of whatever batch size and number of ranks.

        Raises:
            UserError: the samples are not those of the other stream.
        """
        _refuse_other_order(state, self._samples.identity())
        if not self._may_be_other_samples:
            _refuse_other_datasets(state, self._samples.identity())
        self.consumed_samples = int(state["consumed_samples"])


def _refuse_other_order(saved: dict[str, Any], current: dict[str, Any]) -> None:
    for key, name in (("seed", "run.seed"), ("sequence_length", "model.sequence_length")):
        if saved[key] != current[key]:
            raise UserError(
                f"{name} {current[key]} is not the checkpoint's {saved[key]}, so the data would be others; "
                f"set it back, {_AFRESH}"
            )


def _refuse_other_datasets(saved: dict[str, Any], current: dict[str, Any]) -> None:
    before, now = saved["datasets"], current["datasets"]
    if len(before) != len(now):
        raise UserError(
            f"data.train has {len(now)} datasets, the checkpoint's run had {len(before)}; restore them, {_AFRESH}"
        )
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        if old["fingerprint"] != new["fingerprint"]:
            raise UserError(
                f"data.train[{index}] {new['prefix']} is not the checkpoint's data: fingerprint "
                f"{new['fingerprint'][:16]} instead of {old['fingerprint'][:16]}; restore the data, {_AFRESH}"
            )
        if old["seed"] != new["seed"]:
            raise UserError(
                f"data.train[{index}] {new['prefix']} is read with seed {new['seed']}, the checkpoint's run "
                f"used {old['seed']}; set run.seed back, {_AFRESH}"
            )
        if old["weight"] != new["weight"]:
            raise UserError(
                f"data.train[{index}].weight: its share {new['weight']} is not the checkpoint's "
                f"{old['weight']}; set it back, {_AFRESH}"
            )


def validation_batches(
    dataset: Dataset,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    max_samples: int | None = None,
) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
    """Yield this rank's part of one pass over the first samples of a dataset.

    Over all ranks each sample has weight 1 exactly once. Every rank yields the same number of batches, since
    ranks that share experts must take every step together: what is missing at the end is filled with a
    sample of weight 0.

    Args:
        dataset: usually not shuffled, so that the pass is always the same.
        micro_batch_size: samples a batch.
        data_parallel_rank: of this process.
        data_parallel_size: number of ranks.
        max_samples: at most one epoch; all of it by default.

    Yields:
        ``micro`` samples, and their weights, float32 of shape (micro,).
    """
    samples = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    rounds = -(-samples // (micro_batch_size * data_parallel_size))
    for round_number in range(rounds):
        start = (round_number * data_parallel_size + data_parallel_rank) * micro_batch_size
        indices = range(start, start + micro_batch_size)
        rows = [dataset[min(index, samples - 1)] for index in indices]
        weights = [float(index < samples) for index in indices]
        yield MicroBatch.of(rows), torch.tensor(weights)
