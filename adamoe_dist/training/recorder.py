"""The callback that measures: metrics and validation at their intervals, written and shown as one line."""

import logging
from collections.abc import Sequence

from adamoe_dist.data import Dataset
from adamoe_dist.timing import PhaseClock
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.display import Pace, progress_line
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.metrics import Record, RoutingRecord, step_record
from adamoe_dist.training.phases import phase_fields
from adamoe_dist.training.speed import ModelSpeed
from adamoe_dist.training.validation import Validation, validate
from adamoe_dist.training.writers import Board, JsonlWriter

logger = logging.getLogger(__name__)


class Recorder(Callback):
    """Records every ``monitor.log_interval`` steps, every ``train.validation_interval`` steps, first and last.

    A run that a signal or its time limit ends is not validated any more.

    Step time and speed are averages since the last record, without the first step of the process, which allocates and
    compiles; a record of that step alone has its own time, and no ``model_flops_per_second``, ``mfu`` or ``time_*``.
    The phases, ``time_*``, are those of the recorded step itself: a clock runs in no other.

    Attributes:
        first_validation: before training (or None, as on a resumed run).
        last_validation: the latest.
        last_record: the latest metrics of a step.
        board: the writers of tagged scalars, on rank 0.
        pace: of the steps so far.
    """

    def __init__(self, validation_sets: Sequence[Dataset], speed: ModelSpeed) -> None:
        self.first_validation: Validation | None = None
        self.last_validation: Validation | None = None
        self.last_record: Record = {}
        self.board: Board | None = None
        self.pace = Pace()
        self._sets = validation_sets
        self._jsonl: JsonlWriter | None = None
        self._unrecorded: list[StepResult] = []
        self._speed = speed
        self._clock = PhaseClock()
        self._steps = 0
        self._is_measured = False

    def on_start(self, trainer: Trainer) -> None:
        """Open the files and validate the untrained model."""
        if trainer.rank == 0:
            run_dir = trainer.config.run_dir
            self._jsonl = JsonlWriter(run_dir / "metrics.jsonl", trainer.step)
            self.board = Board(trainer.config, trainer.step)
        if self._sets and trainer.step == 0:
            self.first_validation = self._validate(trainer)
            record = {"step": 0, "tokens_seen": 0, **_validation_fields(self.first_validation)}
            self._write(record, {})

    def before_step(self, trainer: Trainer) -> None:
        """Start the clock of the phases in a step that will be recorded, but for the first of this process."""
        settings, step = trainer.config, trainer.step + 1
        intervals = [settings.monitor.log_interval, settings.train.steps]
        if self._sets and settings.train.validation_interval is not None:
            intervals.append(settings.train.validation_interval)
        self._is_measured = self._steps > 0 and any(step % interval == 0 for interval in intervals)
        if self._is_measured:
            trainer.ranges.add(self._clock)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Record the step if it is due."""
        self.pace.note(result.seconds)
        trainer.ranges.remove(self._clock)
        self._steps += 1
        if self._steps == 2:
            self._unrecorded.clear()  # the first step
        self._unrecorded.append(result)
        interval = trainer.config.train.validation_interval
        last = trainer.is_last_step
        is_due = last or (interval is not None and result.step % interval == 0)
        # whoever sent a signal may kill the run soon: it saves first, and only that
        is_validated = bool(self._sets) and trainer.failure is None and trainer.stop_signal is None and is_due
        if not (is_validated or last or result.step % trainer.config.monitor.log_interval == 0):
            return
        steps, self._unrecorded = self._unrecorded, []
        record, layers = step_record(trainer, steps)
        if self._steps > 1:
            load = record["true_experts_per_token"] * (1.0 - record["dropped_share"])
            record.update(self._speed.fields(record["tokens_per_second"], load))
        if self._is_measured:
            save_s = trainer.seconds["save_stall"] / len(steps)
            record.update(phase_fields(trainer, self._clock.take(), result.seconds, save_s))
        record.update({f"{name}_s": seconds for name, seconds in trainer.seconds.items() if seconds})
        trainer.seconds.clear()
        line = progress_line(trainer, record, self.pace)
        logger.info("%s", line, extra={"fitted": line.fitted})
        if is_validated:
            record.update(_validation_fields(self._validate(trainer)))
        self.last_record = record
        self._write(record, layers, last)

    def on_finish(self, trainer: Trainer) -> None:
        """Validate a run that had nothing left to train, and close the files."""
        if self._sets and self.last_validation is None and trainer.stop_signal is None:
            logger.info("nothing left to train: step %d of %d is done", trainer.step, trainer.config.train.steps)
            self._validate(trainer)
        if self._jsonl:
            self._jsonl.close()
        if self.board and trainer.stop_signal is None:
            self.board.finish()

    def close(self) -> None:
        """Close what later callbacks may still have written to."""
        if self.board:
            self.board.close()

    def _validate(self, trainer: Trainer) -> Validation:
        self.last_validation = validate(trainer, self._sets)
        logger.info(
            "validation after step %d: loss %.4f nats/token, %.4f bits/byte (unigram entropy of the text %.4f)",
            trainer.step,
            self.last_validation.loss,
            self.last_validation.bits_per_byte,
            self.last_validation.unigram_entropy,
        )
        return self.last_validation

    def _write(self, record: Record, layers: dict[int, RoutingRecord], is_last: bool = False) -> None:
        if self._jsonl:
            self._jsonl.write(record)
        if self.board:
            self.board.write(record, layers, is_last)


def _validation_fields(validation: Validation) -> Record:
    return {"validation_loss": validation.loss, "validation_bits_per_byte": validation.bits_per_byte}
