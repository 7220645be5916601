"""``heartbeat.json``: what the run does now, for scripts that watch over it."""

import json
import logging
import math
import os
import socket
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

from adamoe_dist.files import replacing
from adamoe_dist.parallel import Progress
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer

logger = logging.getLogger(__name__)

INTERVAL_S = 3.0
"""At most so often, and only while the run gets on: the file of a run that hangs grows old."""


class Heartbeat(Callback):
    """Rank 0's file, replaced as a whole by a thread, so that a slow disk holds up nobody.

    Its phase is ``training`` within a step, the name of the callback that runs between two, and in the end ``finished``
    (exit code 0) or ``stopped``. A process that is killed leaves the last phase it was in.
    """

    def __init__(self, path: Path, progress: Progress, total_steps: int) -> None:
        """Write ``path`` from now on; the last time when ``progress`` ends."""
        self._path, self._progress, self._total_steps = path, progress, total_steps
        self._last: StepResult | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._write()
        progress.on_end = self._finish
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Remember the step."""
        self._last = result

    def _beat(self) -> None:
        written = self._progress.count
        while not self._ended.wait(INTERVAL_S):
            if self._progress.count != written:
                written = self._progress.count
                self._write()

    def _finish(self) -> None:
        self._ended.set()
        self._write()

    def _write(self) -> None:
        """Replace the file; a disk that refuses is a warning, since the training does not need it."""
        try:
            with self._lock, replacing(self._path) as unfinished:
                unfinished.write_text(json.dumps(self._content(), allow_nan=False) + "\n", encoding="utf-8")
        except OSError as problem:
            logger.warning("warning: %s is not written: %s", self._path, problem)

    def _content(self) -> dict[str, Any]:
        now, last, code = datetime.now().astimezone(), self._last, self._progress.exit_code
        phase = self._progress.phase if code is None else "stopped" if code else "finished"
        content = {
            "step": self._progress.step,
            "steps": self._total_steps,
            "time": now.isoformat(timespec="seconds"),
            "epoch": round(now.timestamp(), 3),
            "lm_loss": last.lm_loss if last is not None and math.isfinite(last.lm_loss) else None,
            "step_time_s": None if last is None else last.seconds,
            "phase": phase,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        return content if code is None else {**content, "exit_code": code}
