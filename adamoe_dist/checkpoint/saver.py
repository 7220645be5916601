"""One run's saves: beside training or before it goes on, and what becomes of those that fail."""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from adamoe_dist.checkpoint import tensors as names
from adamoe_dist.checkpoint.agreement import CheckpointError, describe
from adamoe_dist.checkpoint.directory import Retention, newest_complete
from adamoe_dist.checkpoint.save import write_snapshot
from adamoe_dist.checkpoint.snapshot import Snapshot, take_snapshot
from adamoe_dist.errors import UserError
from adamoe_dist.parallel import COLLECTIVE_TIMEOUT, TrainingEngine

_PATIENCE_S = 60.0
"""How long a run that ends by an exception waits for the save in progress: other ranks may be gone."""

logger = logging.getLogger(__name__)


@dataclass
class SaveTimes:
    """What saving took since it was last asked for.

    Attributes:
        stall_s: how long training stood still: copying to CPU memory, waiting for an earlier save, writing where that
            is not in the background.
        write_s: how long writing took, of the saves that ended.
        saved: how many ended well.
        failed: how many did not.
    """

    stall_s: float = 0.0
    write_s: float = 0.0
    saved: int = 0
    failed: int = 0


class CheckpointSaver:
    """Saves a run's checkpoints, at most one at a time.

    In the background a thread of each rank writes a copy of the state, and talks to the others' over a group of its
    own. The copy is of what this rank writes: 12 bytes for each of its weights, over the ranks that hold the same.
    """

    def __init__(self, root: Path, retention: Retention, in_background: bool, goes_on_after_failure: bool) -> None:
        """Prepare to save into ``root``; all ranks call it together."""
        self.root = root
        self._retention = retention
        self._in_background = in_background
        self._goes_on = goes_on_after_failure
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self._writing: _Writing | None = None
        self._is_checked = False
        self._times = SaveTimes()

    def save(
        self,
        step: int,
        engine: TrainingEngine,
        state: dict[str, Any],
        config: dict[str, Any],
        layout: dict[str, Any],
        is_last: bool = False,
    ) -> None:
        """Save what :func:`~adamoe_dist.checkpoint.take_snapshot` takes; all ranks call it together, between two steps.

        The last save of a run is waited for, and if it fails the run fails: there is nothing to go on to.

        Raises:
            UserError: this save, or an earlier one in the background, failed on the disk, and the run is to stop then.
        """
        started = time.perf_counter()
        self._wait()
        snapshot = take_snapshot(step, engine, state, config, layout)
        if not self._is_checked:  # how the tensors are cut does not change
            names.check_coverage(snapshot.tensors)
            self._is_checked = True
        self._writing = _Writing(self.root, snapshot, self._retention, self._group)
        self._writing.start()
        if is_last or not self._in_background:
            self._wait(may_go_on=not is_last)
        self._times.stall_s += time.perf_counter() - started

    def poll(self) -> None:
        """Take note of a save that has ended by now.

        Raises:
            UserError: it failed, and the run is to stop then.
        """
        if self._writing is not None and not self._writing.is_alive():
            self._wait()

    def close(self) -> None:
        """Let a save in progress end, whatever else went wrong; its own failure is logged."""
        if self._writing is not None:
            self._writing.join(_PATIENCE_S)
            if self._writing.problem is not None:
                logger.error("saving the checkpoint of step %d failed: %s", self._writing.step, self._writing.problem)

    def take_times(self) -> SaveTimes:
        """Return what saving took since the last call."""
        times, self._times = self._times, SaveTimes()
        return times

    def _wait(self, may_go_on: bool = True) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        writing.join()
        self._times.write_s += writing.seconds
        if writing.problem is None:
            self._times.saved += 1
            logger.info("saved %s (%.1f s)", writing.path, writing.seconds)
            return
        self._times.failed += 1
        if not isinstance(writing.problem, OSError | CheckpointError):
            raise writing.problem
        last = newest_complete(self.root)
        finding = f"saving the checkpoint of step {writing.step} failed: {describe(writing.problem)}"
        left = f"the last complete one is {last}" if last else "there is no earlier one"
        if not (self._goes_on and may_go_on):
            way_out = "make room, or the directory writable, and continue with checkpoint.resume=auto"
            raise UserError(f"{finding}; {left}; {way_out}") from writing.problem
        logger.warning("%s; %s; training goes on (checkpoint.on_failure=continue)", finding, left)


class _Writing(threading.Thread):
    """One save: this rank's part in it."""

    def __init__(self, root: Path, snapshot: Snapshot, retention: Retention, group: dist.ProcessGroup) -> None:
        super().__init__(name=f"save of step {snapshot.step}", daemon=True)
        self._arguments = (root, snapshot, retention, group)
        self.step = snapshot.step
        self.path: Path | None = None
        self.problem: Exception | None = None
        self.seconds = 0.0

    def run(self) -> None:
        started = time.perf_counter()
        try:
            self.path = write_snapshot(*self._arguments)
        except Exception as problem:
            self.problem = problem
        del self._arguments  # the copy of the state
        self.seconds = time.perf_counter() - started
