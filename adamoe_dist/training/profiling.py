"""Traces of chosen steps on chosen ranks: ``monitor.profile``."""

import logging
import os
from pathlib import Path

import torch

from adamoe_dist import platform
from adamoe_dist.config import ProfileConfig
from adamoe_dist.files import replacing
from adamoe_dist.timing import Annotations
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer

logger = logging.getLogger(__name__)


class StepProfiler(Callback):
    """Records from the start of the first step to the end of the last, with the step's ranges by name.

    What runs between two of these steps is in the trace too; what follows the last is not. A run that ends earlier
    leaves a trace of the steps that it made, a run that fails leaves none.
    """

    def __init__(self, profile: ProfileConfig, directory: Path) -> None:
        """Write to ``directory``; ``profile.steps`` are ``[first, last]``."""
        self._first, self._last = profile.steps
        self._ranks, self._memory = profile.ranks, profile.memory
        self._directory = directory
        self._annotations = Annotations()
        self._profile: torch.profiler.profile | None = None
        self._step_range: torch.profiler.record_function | None = None
        self._started = 0

    def on_start(self, trainer: Trainer) -> None:
        """Say so where a resumed run comes too late."""
        if trainer.rank == 0 and trainer.step >= self._last:
            logger.info(
                "monitor.profile.steps=[%d, %d] are done: the run continues after step %d and nothing is profiled",
                self._first,
                self._last,
                trainer.step,
            )

    def before_step(self, trainer: Trainer) -> None:
        """Begin the trace, and the range of one step."""
        step = trainer.step + 1
        if self._profile is None and trainer.rank in self._ranks and self._first <= step <= self._last:
            self._start(trainer, step)
        if self._profile is not None:
            # TensorBoard's plugin looks for this name.
            self._step_range = torch.profiler.record_function(f"ProfilerStep#{step}")
            self._step_range.__enter__()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """End the range of one step, and the trace."""
        if self._profile is None or self._step_range is None:
            return
        self._step_range.__exit__(None, None, None)
        self._step_range = None
        if result.step >= self._last or trainer.is_last_step:
            self._finish(trainer, result.step)

    def close(self) -> None:
        """Drop a trace that was begun, when an exception ends the run."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            platform.stop_memory_history(None)

    def _start(self, trainer: Trainer, step: int) -> None:
        self._started = step
        if self._memory:
            platform.start_memory_history()
        activities = platform.profiled_activities()
        self._profile = torch.profiler.profile(activities=activities, profile_memory=self._memory)
        self._profile.start()
        if not platform.is_under_nsight():  # the loop has annotations then
            trainer.ranges.add(self._annotations)

    def _finish(self, trainer: Trainer, step: int) -> None:
        """Write the files; a disk that refuses is a warning, since the training does not need them."""
        recorded, self._profile = self._profile, None
        assert recorded is not None, "no trace was begun"
        trainer.ranges.remove(self._annotations)
        recorded.stop()
        name = f"rank_{trainer.rank:04d}_steps_{self._started}-{step}"
        trace = self._directory / f"{name}.pt.trace.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with replacing(trace) as unfinished:
                recorded.export_chrome_trace(str(unfinished))
                _require_whole(unfinished)
            if self._memory:
                platform.stop_memory_history(self._directory / f"{name}.memory.pickle")
        except OSError as problem:
            platform.stop_memory_history(None)
            logger.warning("warning: the profile %s is not written: %s", trace, problem)
            return
        logger.info("profile of steps %d to %d in %s; open it with https://ui.perfetto.dev", self._started, step, trace)


def _require_whole(trace: Path) -> None:
    """Look at the end of a trace, since the profiler says nothing of a disk that is full.

    Raises:
        OSError: the file is missing or not whole.
    """
    with trace.open("rb") as file:
        file.seek(-min(64, trace.stat().st_size), os.SEEK_END)
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{trace} was cut off")
