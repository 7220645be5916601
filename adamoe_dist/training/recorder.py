"""The callback that measures: metrics and validation at their intervals, written and shown as one line."""

import logging
from collections.abc import Sequence

from adamoe_dist.data import Dataset
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.metrics import Record, RoutingRecord, step_record
from adamoe_dist.training.validation import Validation, validate
from adamoe_dist.training.writers import Board, JsonlWriter

logger = logging.getLogger(__name__)


class Recorder(Callback):
    """Records every ``monitor.log_interval`` steps, every ``train.validation_interval`` steps, first and last.

    Attributes:
        first_validation: before training (or None, as on a resumed run).
        last_validation: the latest.
        last_record: the latest metrics of a step.
        board: the writers of tagged scalars, on rank 0.
    """

    def __init__(self, validation_sets: Sequence[Dataset]) -> None:
        self.first_validation: Validation | None = None
        self.last_validation: Validation | None = None
        self.last_record: Record = {}
        self.board: Board | None = None
        self._sets = validation_sets
        self._jsonl: JsonlWriter | None = None
        self._seconds: list[float] = []

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

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Record the step if it is due."""
        self._seconds.append(result.seconds)
        interval = trainer.config.train.validation_interval
        last = trainer.is_last_step
        is_validated = (
            bool(self._sets)
            and trainer.failure is None
            and (last or (interval is not None and result.step % interval == 0))
        )
        if not (is_validated or last or result.step % trainer.config.monitor.log_interval == 0):
            return
        average_s = sum(self._seconds) / len(self._seconds)
        self._seconds = []
        record, layers = step_record(trainer, result, average_s)
        record.update({f"{name}_s": seconds for name, seconds in trainer.seconds.items() if seconds})
        trainer.seconds.clear()
        logger.info("%s", progress_line(trainer, record))
        if is_validated:
            record.update(_validation_fields(self._validate(trainer)))
        self.last_record = record
        self._write(record, layers, last)

    def on_finish(self, trainer: Trainer) -> None:
        """Validate a run that had nothing left to train, and close the files."""
        if self._sets and self.last_validation is None:
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


def progress_line(trainer: Trainer, record: Record) -> str:
    """Return the line that people read for one logged step, with the time left."""
    left_s = (trainer.config.train.steps - trainer.step) * record["step_time_s"]
    return (
        f"step {record['step']}/{trainer.config.train.steps} | loss {record['lm_loss']:.4f} | "
        f"balance {record['balance_loss']:.4f} | norm {record['grad_norm']:.3f} | lr {record['learning_rate']:.2e} | "
        f"load {record['true_experts_per_token']:.2f} (null {record['null_share']:.0%}, "
        f"all-null {record['all_null_share']:.0%}) | rows {record['dispatch_rows']}"
        f"/{record['dispatch_rows_undeduplicated']} | {record['tokens_per_second']:.0f} tok/s | "
        f"{record['step_time_s']:.2f} s/step | left {duration(left_s)}"
    )


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
