"""Loss spikes: found by comparison with the losses before, and reported."""

import logging
import math
from collections import deque
from dataclasses import dataclass

from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer

logger = logging.getLogger(__name__)

FEWEST_LOSSES = 20
"""Before a deviation means anything; fewer where the window is smaller."""

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Spike:
    """A loss and those that it is compared with."""

    loss: float
    mean: float
    deviation: float


class SpikeDetector:
    """Compares each loss with the mean and the standard deviation of the finite ones before it."""

    def __init__(self, window: int, factor: float) -> None:
        """Compare with the last ``window`` losses; a spike is more than ``factor`` deviations above their mean."""
        self._losses: deque[float] = deque(maxlen=window)
        self._factor = factor
        self._fewest = min(window, FEWEST_LOSSES)
        self._is_above = False

    def add(self, loss: float) -> Spike | None:
        """Take the next loss, and return a spike where one begins: a loss that stays high is reported once."""
        if not math.isfinite(loss):
            return None
        spike = self._compared(loss)
        begins = spike is not None and not self._is_above
        self._is_above = spike is not None
        self._losses.append(loss)
        return spike if begins else None

    def _compared(self, loss: float) -> Spike | None:
        if len(self._losses) < self._fewest:
            return None
        mean = math.fsum(self._losses) / len(self._losses)
        deviation = math.sqrt(math.fsum((other - mean) ** 2 for other in self._losses) / len(self._losses))
        least = _ROUNDING * abs(mean)  # losses that do not move differ by rounding
        return Spike(loss, mean, deviation) if loss - mean > self._factor * max(deviation, least) else None


class SpikeReporter(Callback):
    """Warns of loss spikes on rank 0 and counts them as ``loss_spikes``; the run goes on."""

    def __init__(self, window: int, factor: float) -> None:
        """See :class:`SpikeDetector`."""
        self._detector = SpikeDetector(window, factor)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Look at the step's loss."""
        spike = self._detector.add(result.lm_loss)
        if spike is None:
            return
        trainer.events["loss_spikes"] += 1
        if trainer.rank == 0:
            logger.warning(
                "warning: loss spike at step %d: %.4f, where the losses before have mean %.4f and deviation %.4f; its "
                "batch is %s",
                result.step,
                spike.loss,
                spike.mean,
                spike.deviation,
                trainer.batches.describe(result.first_sample),
            )
