"""What can be attached to the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adamoe_dist.training.loop import Trainer


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a global batch."""

    real: int
    """Read, without padding."""
    with_loss: int
    """That the loss is a mean over."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: loss in nats a token over the global batch, gradient norm before clipping.

    Of a bad step, which changed nothing, loss and norm may be NaN or infinite.
    """

    step: int
    lm_loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    first_sample: int
    """Of its batch, in the data order."""
    tokens: TokenCounts


class Callback:
    """Called on every rank, in the order of attachment."""

    def on_start(self, trainer: Trainer) -> None:
        """Act before the first step."""

    def before_step(self, trainer: Trainer) -> None:
        """Act before optimizer step ``trainer.step + 1``."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Act after optimizer step ``result.step`` (from 1)."""

    def on_finish(self, trainer: Trainer) -> None:
        """Act after the last step, also when a signal ended the run."""
