"""The training loop."""

import logging
import math
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import FrameType

import torch
import torch.distributed as dist

from adamoe_dist import platform
from adamoe_dist.config import Config, Resolved
from adamoe_dist.data import BatchStream, MicroBatch
from adamoe_dist.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, NumericalError
from adamoe_dist.launcher import STARTED
from adamoe_dist.model import LanguageModel
from adamoe_dist.parallel import TRAINING, Progress, Schedule, TrainingEngine, has_finite_weights, sum_of
from adamoe_dist.timing import DATA, OPTIMIZER, Annotations, Ranges
from adamoe_dist.training.callback import Callback, StepResult, TokenCounts
from adamoe_dist.training.load_control import load_controller
from adamoe_dist.training.schedules import balance_coefficient, learning_rate

EXIT_CODES = {
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGUSR1: EXIT_TERMINATED,
    signal.SIGALRM: EXIT_TERMINATED,
}
"""The signals that make a run save and stop; SIGALRM is ``checkpoint.time_limit_minutes``'s own."""
logger = logging.getLogger(__name__)
_TOKENS_OF_BATCH = (attrgetter("real_tokens"), attrgetter("loss_tokens"))


class Trainer:
    """Runs optimizer steps and calls the callbacks; what they need is public.

    Attributes:
        config: the tree.
        resolved: its arithmetic.
        engine: the model under ZeRO.
        model: the model itself.
        batches: this rank's data.
        rank: this process's global rank.
        device: where the model is.
        schedule: the passes of a step over the pipeline's stages.
        num_moe_layers: MoE layers of the whole model.
        first_moe_layer: how many of them earlier stages have.
        step: optimizer steps done.
        tokens_seen: tokens trained on, over all ranks; padding is none.
        stop_signal: the signal that asked the run to stop, if any.
        seconds: what time went to since the last record, by the name of its metric without ``_s``.
        failure: why the numbers stop the run, if they do.
        events: what went wrong in this process so far, by the name of its metric.
        progress: marked at every forward pass and change of phase.
        ranges: told which part of a step the loop, the schedule and the MoE layers are in.
    """

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        engine: TrainingEngine,
        model: LanguageModel,
        batches: BatchStream,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        callbacks: Sequence[Callback],
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.resolved = resolved
        self.engine = engine
        self.model = model
        self.batches = batches
        self.rank = rank
        self.device = device
        self.callbacks = callbacks
        self.step = 0
        self.tokens_seen = 0
        self.stop_signal: signal.Signals | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.failure: str | None = None
        self.events: Counter[str] = Counter()
        self.progress = progress or Progress()
        model.register_forward_pre_hook(lambda *_: self.progress.advance())
        self._bad_in_a_row = 0
        self._load_controller = load_controller(config, model)
        self._received: signal.Signals | None = None
        self.ranges = Ranges()
        if platform.is_under_nsight():
            self.ranges.add(Annotations())
        for layer in model.moe_layers:
            layer.ranges = self.ranges
        self.schedule = Schedule(engine, model, dtype, device, self.ranges)
        self.num_moe_layers = len(config.moe_layers)
        self.first_moe_layer = config.moe_layers.index(model.moe_layers[0].layer_number - 1)

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows."""
        return self.step >= self.config.train.steps or self.stop_signal is not None or self.failure is not None

    def run(self) -> int:
        """Train to ``train.steps`` and return the exit code: 0, or that of the signal that stopped the run.

        Raises:
            NumericalError: ``train.max_bad_steps`` steps in a row were bad: a router's scores, the loss or the gradient
                norm were NaN or infinite. Or one was, and the weights are not finite.
        """
        previous = {number: signal.signal(number, self._note_signal) for number in EXIT_CODES}
        if self.config.checkpoint.time_limit_minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, _time_left_s(self.config.checkpoint.time_limit_minutes))
        try:
            for callback in self._callbacks_in_turn():
                callback.on_start(self)
            while not self.is_last_step:
                for callback in self._callbacks_in_turn():
                    callback.before_step(self)
                self.progress.enter(TRAINING)
                result = self._train_step()
                for callback in self._callbacks_in_turn():
                    callback.after_step(self, result)
            if self.failure is not None:
                raise NumericalError(self.failure)
            for callback in self._callbacks_in_turn():
                callback.on_finish(self)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 0 if self.stop_signal is None else EXIT_CODES[self.stop_signal]

    def _callbacks_in_turn(self) -> Iterator[Callback]:
        for callback in self.callbacks:
            self.progress.enter(type(callback).__name__)
            yield callback

    def _train_step(self) -> StepResult:
        started = time.perf_counter()
        rate = learning_rate(self.config, self.step)
        self._prepare_layers()
        self.engine.train()
        first_sample = self.batches.consumed_samples
        with self.ranges(DATA):
            micro_batches = self.batches.next_step()
            on_device = [batch.to(self.device) for batch in micro_batches]
        total = self.schedule.run(on_device)
        lm_loss, tokens, bad_tokens = self._agree(total, micro_batches)
        finding = self._bad_scores(bad_tokens) or self._bad_loss(lm_loss)
        self.engine.set_learning_rate(rate)
        with self.ranges(OPTIMIZER):
            self.engine.step(discard=finding is not None)
        norm = self.engine.gradient_norm()
        if finding is None:
            finding, norm = self._judge_norm(norm)
        if finding is None and self._load_controller is not None:
            self._load_controller.update(self.step)
        self.step += 1
        self.tokens_seen += tokens.real
        self.progress.step = self.step
        if finding is None:
            self._bad_in_a_row = 0
        else:
            self._note_bad_step(finding, first_sample)
        platform.synchronize()
        return StepResult(self.step, lm_loss, norm, rate, time.perf_counter() - started, first_sample, tokens)

    def _judge_norm(self, norm: float) -> tuple[str | None, float]:
        """Return what is wrong with the gradient norm of the step, and the norm: 0 where fp16 overflowed."""
        if not self.engine.is_skipped:
            return None if math.isfinite(norm) else f"the gradient norm of step {self.step + 1} is not finite", norm
        if self.engine.loss_scale <= 1.0:
            return f"the fp16 gradient of step {self.step + 1} overflows at a loss scale of 1", 0.0
        return None, 0.0

    def _note_bad_step(self, finding: str, first_sample: int) -> None:
        """Warn of a step that was not applied; stop the run where too many were, or where none can get better.

        Raises:
            NumericalError: the weights are not finite. They are not to be saved.
        """
        self.events["bad_steps"] += 1
        self._bad_in_a_row += 1
        allowed = self.config.train.max_bad_steps
        message = f"{finding}; its batch is {self.batches.describe(first_sample)}"
        if not has_finite_weights(self.engine.deepspeed.optimizer, self.model):
            raise NumericalError(
                f"{message}; weights are not finite, so nothing is saved; lower optimizer.learning_rate or resume from "
                "the last checkpoint"
            )
        if self._bad_in_a_row >= allowed:
            self.failure = (
                f"{message}; bad steps in a row: {self._bad_in_a_row} (train.max_bad_steps={allowed}); the weights are "
                "those before them; lower optimizer.learning_rate or resume from an earlier checkpoint"
            )
        elif self.rank == 0:
            logger.warning(
                "warning: %s; the step is not applied (bad steps in a row: %d, train.max_bad_steps=%d)",
                message,
                self._bad_in_a_row,
                allowed,
            )

    def _prepare_layers(self) -> None:
        coefficient = balance_coefficient(self.config, self.step)
        for layer in self.model.moe_layers:
            layer.counters.reset()
            layer.set_balance_coefficient(coefficient)

    def _agree(self, loss: torch.Tensor, micro_batches: list[MicroBatch]) -> tuple[float, TokenCounts, list[float]]:
        """Agree on whether a signal asks to stop, in one collective with what the ranks must know of each other.

        Returns:
            The mean loss over ranks, the tokens of the global batch, and for each MoE layer the tokens of all ranks
            with NaN or infinite scores.
        """
        received = torch.zeros(len(EXIT_CODES), dtype=torch.float64, device=self.device)
        if self._received is not None:
            received[list(EXIT_CODES).index(self._received)] = 1.0
        bad_tokens = torch.zeros(self.num_moe_layers, dtype=torch.float64, device=self.device)
        for place, layer in enumerate(self.model.moe_layers, self.first_moe_layer):
            bad_tokens[place] = layer.counters.value("nonfinite_tokens", self.device)
        counted = torch.stack([sum_of([count(batch) for batch in micro_batches]) for count in _TOKENS_OF_BATCH])
        shared = torch.cat([loss.double().view(1), counted.double().to(self.device), received, bad_tokens])
        dist.all_reduce(shared)
        total, real, with_loss, *counts = shared.tolist()
        for number, count in zip(EXIT_CODES, counts, strict=False):
            if count > 0:
                self.stop_signal = number
        layout = self.resolved.layout
        copies = layout.world_size // layout.data  # ranks that have the same samples
        tokens = TokenCounts(round(real) // copies, round(with_loss) // copies)
        return total / (layout.replicas * layout.tensor), tokens, counts[len(EXIT_CODES) :]

    def _bad_scores(self, bad_tokens: list[float]) -> str | None:
        """Name the first layer that went wrong; the layers above it only inherit that."""
        for layer, tokens in zip(self.config.moe_layers, bad_tokens, strict=True):
            if tokens:
                return (
                    f"the router of layer {layer + 1} gives NaN or infinite scores for {tokens:.0f} tokens of "
                    f"step {self.step + 1}"
                )
        return None

    def _bad_loss(self, loss: float) -> str | None:
        return None if math.isfinite(loss) else f"the loss of step {self.step + 1} is {loss}"

    def _note_signal(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number)


def _time_left_s(limit_minutes: float) -> float:
    """Return how long this process may still run, counted from its start; more than nothing."""
    return max(60 * limit_minutes - (time.monotonic() - STARTED), 1e-3)
