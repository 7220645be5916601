"""Marks that a rank gets on, for those who watch it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

TRAINING = "training"
"""The phase of optimizer steps; the other phases are named after what runs between them."""

LEAST_TRAFFIC = 1 << 20
"""Bytes of files, between two looks, by which a long save is told from one that hangs."""


class Progress:
    """What a rank does and when it last got on. A mark costs a clock reading.

    Attributes:
        count: marks so far; 0 before the first step.
        step: optimizer steps done.
        phase: what the rank does.
        exit_code: of the run, once it ends.
        on_end: called when the run ends, once.
    """

    def __init__(self) -> None:
        self.count = 0
        self.step = 0
        self.phase = "starting"
        self.exit_code: int | None = None
        self.on_end: Callable[[], None] | None = None
        self._marked_at = time.monotonic()
        self._traffic = 0

    @property
    def age_s(self) -> float:
        """Seconds since the last mark."""
        return time.monotonic() - self._marked_at

    def advance(self) -> None:
        """Mark that something was done."""
        self.count += 1
        self._marked_at = time.monotonic()

    def enter(self, phase: str) -> None:
        """Mark that something else begins."""
        self.phase = phase
        self.advance()

    def end(self, exit_code: int) -> None:
        """Say that the run ends with ``exit_code``; only the first time counts."""
        if self.exit_code is None:
            self.exit_code = exit_code
            if self.on_end is not None:
                self.on_end()

    def note_traffic(self) -> None:
        """Between steps, take files that grow for progress: a large checkpoint is one call that marks nothing."""
        if self.phase == TRAINING:
            return
        traffic = file_traffic()
        if traffic - self._traffic > LEAST_TRAFFIC:
            self._traffic = traffic
            self.advance()


def file_traffic() -> int:
    """Return the bytes that this process, with the children that are alive, has read and written; 0 if not counted."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    names = ["self", *(children.read_text().split() if children.exists() else [])]
    return sum(_traffic_of(name) for name in names)


def _traffic_of(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines()
    except OSError:  # it ended, or the kernel does not count
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
