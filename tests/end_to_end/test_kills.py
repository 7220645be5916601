"""A run whose ranks are killed at random moments, again and again, and continued by ``checkpoint.resume=auto``."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adamoe_dist.checkpoint import find_checkpoint, read_manifest, verify_files
from tests.end_to_end.conftest import metrics_of
from tests.end_to_end.nursery import Nursery, text_of

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]

STEPS = 24
OVERRIDES = [
    f"train.steps={STEPS}",
    "train.validation_interval=null",
    "train.validation_samples=8",
    "checkpoint.interval=1",
    "checkpoint.keep_last=3",
    "checkpoint.resume=auto",
    "monitor.tensorboard=false",
    "monitor.log_interval=1",
]


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def steps_in(folder: Path) -> int:
    output = folder / "out0"
    return output.read_text().count("\nstep ") if output.exists() else 0  # it is the rank that makes it


def wait_for_step(folder: Path, pids: list[int], count: int) -> None:
    deadline = time.monotonic() + 120
    while not steps_in(folder) >= count:
        assert time.monotonic() < deadline and all(Path(f"/proc/{pid}").exists() for pid in pids), text_of(folder)
        time.sleep(0.01)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, but for the random states."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    from adamoe_dist.checkpoint.index import read_shapes

    path = find_checkpoint("auto", run_dir / "checkpoints")
    assert path is not None and read_manifest(path)["step"] == STEPS
    shapes = {name: shape for name, shape in read_shapes(path).items() if not name.startswith("rng.")}
    tensors = {
        name: torch.empty(shape, dtype=torch.int64 if name == "optimizer.step" else torch.float32)
        for name, shape in shapes.items()
    }
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_whoever_is_killed_and_whenever_the_run_goes_on_and_ends_as_if_nothing_had_happened(
    nursery: Nursery, workspace: Path, tmp_path: Path, kills: int
) -> None:
    """Kills fall on steps, copies, writes, renames and removals; a rank alone or both; writing beside training or not.

    A killed run is continued, and killed again before it can end; when it has come to the end it is not let go on, so
    that every kill falls on a run that trains and saves: a fresh run takes its place.
    """
    straight = workspace / "runs" / f"straight{kills}"
    nursery.start(tmp_path / "straight", *OVERRIDES, f"run.dir={straight}")
    assert nursery.codes() == [0, 0], text_of(tmp_path / "straight")
    expected, metrics = weights_of(straight), metrics_of(straight)
    draw = random.Random(20 + kills)
    run_dir, ended = workspace / "runs" / f"killed{kills}-0", 0
    for number in range(kills):
        before = step_of(find_checkpoint("auto", run_dir / "checkpoints"))
        folder = tmp_path / f"{number}"
        background = draw.choice(["true", "false"])
        pids = nursery.start(folder, *OVERRIDES, f"run.dir={run_dir}", f"checkpoint.asynchronous={background}")
        if before < STEPS - 2:
            wait_for_step(folder, pids, 1)
        time.sleep(draw.uniform(0, 0.6))
        kill(draw.choice([pids, pids[:1], pids[1:]]))
        time.sleep(draw.uniform(0, 0.3))  # what the rest does in its last moments is part of it
        kill(pids)
        nursery.codes()
        after = find_checkpoint("auto", run_dir / "checkpoints")
        assert step_of(after) >= before
        if after is not None:
            verify_files(after)
            if step_of(after) >= STEPS - 2:
                ended += 1
                finish(nursery, tmp_path / f"end{ended}", run_dir, expected, metrics)
                run_dir = workspace / "runs" / f"killed{kills}-{ended}"
    finish(nursery, tmp_path / "end", run_dir, expected, metrics)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(read_manifest(checkpoint)["step"])


def finish(
    nursery: Nursery, folder: Path, run_dir: Path, expected: dict[str, torch.Tensor], metrics: list[dict[str, Any]]
) -> None:
    """Continue to the end, without a hand laid on anything: the same bits as without a kill, and no leftovers."""
    nursery.start(folder, *OVERRIDES, f"run.dir={run_dir}")
    assert nursery.codes() == [0, 0], text_of(folder)
    ours = weights_of(run_dir)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert [record.get("lm_loss") for record in metrics_of(run_dir)] == [record.get("lm_loss") for record in metrics]
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {f"iter_{step:07d}" for step in (STEPS - 2, STEPS - 1, STEPS)} | {
        "latest_checkpointed_iteration.txt"
    }
