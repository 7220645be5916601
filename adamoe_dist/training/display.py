"""What a person reads while a run trains: a line a logged step, and a bar with the time left on a terminal."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from adamoe_dist.console import step_bar
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.metrics import Record

RECENT_STEPS = 50
_UNITS = ("", "k", "M", "G", "T", "P")


class Pace:
    """How long the rest of a run takes, from the steps of this process but for its first, which warms up.

    A step counts as the last ones took, and what came between steps (validation, saving) as it was spread over all.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._steps = 0
        self._inside_s = 0.0

    def note(self, step_s: float, now: float | None = None) -> None:
        """Take a step that ends at ``now`` (a reading of ``time.perf_counter``) and took ``step_s`` seconds."""
        if self._began is None:
            self._began = time.perf_counter() if now is None else now
            return
        self._recent.append(step_s)
        self._steps += 1
        self._inside_s += step_s

    def left_s(self, steps: int, now: float | None = None) -> float | None:
        """Return the seconds that ``steps`` more steps take, or None while only the first one is known."""
        if not steps:
            return 0.0
        if self._began is None or not self._recent:
            return None
        elapsed_s = (time.perf_counter() if now is None else now) - self._began
        between_s = max(elapsed_s - self._inside_s, 0.0) / self._steps
        return steps * (sum(self._recent) / len(self._recent) + between_s)


@dataclass(frozen=True)
class Field:
    """A part of a line; ``short`` takes its place, or it is left out, where the line is too long.

    The parts with the largest ``rank`` give way first; 0 never does.
    """

    text: str
    rank: int = 0
    short: str = ""


@dataclass(frozen=True)
class ProgressLine:
    """The line of one logged step."""

    fields: tuple[Field, ...]

    def __str__(self) -> str:
        return " | ".join(field.text for field in self.fields)

    def fitted(self, width: int) -> str:
        """Return the line in at most ``width`` columns, as far as its parts can give way."""
        texts = {field: field.text for field in self.fields}
        for field in sorted(self.fields, key=lambda field: -field.rank):
            line = " | ".join(text for text in texts.values() if text)
            if len(line) <= width or not field.rank:
                return line
            texts[field] = field.short
        return " | ".join(text for text in texts.values() if text)


def progress_line(trainer: Trainer, record: Record, pace: Pace) -> ProgressLine:
    """Return the line that people read for one logged step, with the time left."""
    steps, load = trainer.config.train.steps, f"load {record['true_experts_per_token']:.2f}"
    nulls = f"null {record['null_share']:.0%}, all-null {record['all_null_share']:.0%}"
    rows = f"rows {quantity(record['dispatch_rows'])}/{quantity(record['dispatch_rows_undeduplicated'])}"
    return ProgressLine(
        (
            Field(f"step {record['step']}/{steps}"),
            Field(f"loss {record['lm_loss']:.4f}"),
            Field(f"load {record['true_experts_per_token']:.2f} ({nulls})", 2, load),
            Field(f"{quantity(record['tokens_per_second'])} tok/s"),
            Field(f"{seconds_of_step(float(record['step_time_s']))}/step", 3),
            Field(f"norm {record['grad_norm']:.3g}", 1),
            Field(f"lr {record['learning_rate']:.2e}", 4),
            Field(f"balance {record['balance_loss']:.4f}", 5),
            Field(rows, 6),
            Field(f"left {time_left(trainer, pace)}"),
        )
    )


def time_left(trainer: Trainer, pace: Pace) -> str:
    """Return the time left in words; a question mark while only the first step is known."""
    left_s = pace.left_s(trainer.config.train.steps - trainer.step)
    return "?" if left_s is None else duration(left_s)


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds_of_step(seconds: float) -> str:
    """Return the time of a step with three digits that say something."""
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def quantity(number: float) -> str:
    """Return a count with three digits and a unit from a thousand on: 950, 4.15k, 1.2M."""
    if abs(number) < 1000:
        return f"{number:.0f}"
    for unit in _UNITS:
        if abs(number) < 999.5 or unit == _UNITS[-1]:
            break
        number /= 1000
    return f"{number:.3g}{unit}"


class ProgressBar(Callback):
    """A bar below the lines, where rank 0 writes to a terminal; nothing at all elsewhere."""

    def __init__(self, pace: Pace) -> None:
        """Show the time left that ``pace`` knows of."""
        self._pace = pace
        self._bar: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Draw the bar."""
        if trainer.rank == 0:
            self._bar = step_bar(trainer.config.train.steps, trainer.step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Move it on."""
        if self._bar is not None:
            left = time_left(trainer, self._pace)
            self._bar.set_postfix_str(f"loss {result.lm_loss:.4f}, left {left}", refresh=False)
            self._bar.update()

    def on_finish(self, trainer: Trainer) -> None:
        """Take it away before the last lines."""
        self.close()

    def close(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
