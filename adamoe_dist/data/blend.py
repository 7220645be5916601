"""Several datasets as one, in exact proportions."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adamoe_dist.data.micro_batch import Sample
from adamoe_dist.data.shuffle import permutation
from adamoe_dist.errors import UserError

_SMALLEST_BLOCK = 1024


class Samples(Protocol):
    """An endless sequence of samples, as `TokenDataset`, `ExampleSamples` and `BlendedSamples` are."""

    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index`` >= 0, of sequence_length + 1 tokens."""

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the order and content of the samples."""


class Dataset(Samples, Protocol):
    """Samples of one source: `TokenDataset` or `ExampleSamples`."""

    prefix: str
    sequence_length: int

    def __len__(self) -> int:
        """Samples of one epoch."""

    @property
    def tokens(self) -> int:
        """Tokens that count in its loss."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each of them."""

    @property
    def unigram_entropy(self) -> float:
        """Nats a token of a model that knows only their frequencies."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that cut the text."""


class BlendedSamples:
    """Draws from each dataset in proportion to its weight.

    Samples come in blocks of B. After b blocks, floor(b B w) samples of a dataset with the share w have been
    used; the dataset with the largest share takes what is left. Inside a block the order of datasets is
    random. Each dataset's own samples are used in their order 0, 1, 2 ... So the choice for any index is
    found without walking there, and a blend of one dataset is that dataset.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], seed: int) -> None:
        """Blend ``datasets``.

        Args:
            datasets: all of one sequence length and one tokenizer.
            weights: one a dataset, not negative; only their proportions count.
            seed: of the order.

        Raises:
            UserError: a weight cannot be used, or the datasets were cut by different tokenizers.
        """
        _check(datasets, weights)
        self.datasets = list(datasets)
        self.seed = seed
        # From the decimal form, so that 0.1 is a tenth and not its nearest binary fraction.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self._largest = max(range(len(exact)), key=lambda index: self.shares[index])
        self.block_size = max(_SMALLEST_BLOCK, len(exact) * (len(exact) - 1))
        self._block = lru_cache(maxsize=2)(self._make_block)

    @property
    def sequence_length(self) -> int:
        """Tokens that a model predicts from one sample."""
        return self.datasets[0].sequence_length

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the order and content of the samples."""
        parts = [
            {**dataset.identity()["datasets"][0], "weight": str(share)}
            for dataset, share in zip(self.datasets, self.shares, strict=True)
        ]
        return {"seed": self.seed, "sequence_length": self.sequence_length, "datasets": parts}

    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index`` >= 0, of sequence_length + 1 tokens."""
        dataset, sample = self.locate(index)
        return self.datasets[dataset][sample]

    def locate(self, index: int) -> tuple[int, int]:
        """Return which dataset sample ``index`` >= 0 comes from, and its index there."""
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        if len(self.datasets) == 1:
            return 0, int(index)
        block, position = divmod(int(index), self.block_size)
        choices, samples = self._block(block)
        return int(choices[position]), int(samples[position])

    def used_before_block(self, block: int) -> list[int]:
        """Return how many samples of each dataset the blocks before ``block`` use."""
        total = block * self.block_size
        used = [math.floor(total * share) for share in self.shares]
        used[self._largest] += total - sum(used)
        return used

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dataset and its sample for each position of a block, shape (B,) each."""
        before, after = self.used_before_block(block), self.used_before_block(block + 1)
        counts = [end - start for start, end in zip(before, after, strict=True)]
        ordered = np.repeat(np.arange(len(counts)), counts)
        choices = ordered[permutation(self.block_size, "blend", self.seed, block)]
        samples = np.empty_like(choices)
        for dataset, start in enumerate(before):
            samples[choices == dataset] = start + np.arange(counts[dataset])
        return choices, samples


def _check(datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
    if not datasets:
        raise UserError("data.train is empty; name at least one prepared dataset")
    if len(datasets) != len(weights):
        raise UserError(f"data.train has {len(datasets)} datasets and {len(weights)} weights; give one each")
    for index, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"data.train[{index}].weight {weight} is not a number of 0 or more; change it")
    if sum(weights) == 0:
        raise UserError("data.train: every weight is 0; give one of them a positive weight")
    for first, second in pairwise(datasets):
        if first.tokenizer_fingerprint != second.tokenizer_fingerprint:
            raise UserError(
                f"data.train: {first.prefix} and {second.prefix} were prepared with different tokenizers; "
                "prepare both with one"
            )
        assert first.sequence_length == second.sequence_length
