"""What the model gets at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MaskedSample:
    """A sample of which not every token counts.

    Attributes:
        tokens: int64 (S + 1,).
        loss_mask: bool (S,), true where the next token is one that the loss is of.
        padding_mask: bool (S,), true where the token read is padding.
    """

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    padding_mask: NDArray[np.bool_]


Sample = NDArray[np.int64] | MaskedSample
"""Token ids (S + 1,), all of which count, or with masks."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        tokens: int64 (B, S + 1).
        loss_mask: bool (B, S), true where the next token is one that the loss is of; None: everywhere.
        padding_mask: bool (B, S), true where the token read is padding, which is routed nowhere; None: nowhere.
    """

    tokens: Tensor
    loss_mask: Tensor | None = None
    padding_mask: Tensor | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "MicroBatch":
        """Stack samples of one kind."""
        masked = [sample for sample in samples if isinstance(sample, MaskedSample)]
        if not masked:
            return cls(torch.from_numpy(np.stack([np.asarray(sample) for sample in samples])))
        assert len(masked) == len(samples), "samples with and without masks in one batch"
        return cls(
            torch.from_numpy(np.stack([sample.tokens for sample in masked])),
            torch.from_numpy(np.stack([sample.loss_mask for sample in masked])),
            torch.from_numpy(np.stack([sample.padding_mask for sample in masked])),
        )

    @property
    def counts_tokens(self) -> bool:
        """Whether the loss is a mean over the tokens that count, and not over all samples alike."""
        return self.loss_mask is not None

    @property
    def loss_tokens(self) -> Tensor:
        """Tokens that the loss is of, 0-d int64."""
        return _count(self.loss_mask, self.tokens)

    @property
    def real_tokens(self) -> Tensor:
        """Tokens read that are not padding, 0-d int64."""
        return _count(None if self.padding_mask is None else ~self.padding_mask, self.tokens)

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device without waiting for it."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return MicroBatch(self.tokens.to(device, non_blocking=True), moved(self.loss_mask), moved(self.padding_mask))


def _count(mask: Tensor | None, tokens: Tensor) -> Tensor:
    if mask is None:
        return torch.tensor(tokens.shape[0] * (tokens.shape[1] - 1), device=tokens.device)
    return mask.sum()
