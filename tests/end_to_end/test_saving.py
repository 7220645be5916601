"""Saves of whole runs: what they cost, disks that refuse them, and what makes a run save and stop."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from adamoe_dist.checkpoint import find_checkpoint
from tests.end_to_end.nursery import Nursery, text_of

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]

QUICK = ["train.validation_samples=8", "monitor.tensorboard=false", "monitor.log_interval=1", "checkpoint.resume=auto"]
ENDLESS = [*QUICK, "train.steps=100000"]


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def names(*steps: int) -> list[str]:
    return [*(f"iter_{step:07d}" for step in steps), "latest_checkpointed_iteration.txt"]


@pytest.mark.parametrize("background", [True, False])
def test_the_stall_is_in_the_metrics_and_the_log(
    nursery: Nursery, workspace: Path, tmp_path: Path, background: bool
) -> None:
    run_dir = workspace / "runs" / f"stall_{background}"
    every = ["train.steps=6", "checkpoint.interval=2", f"checkpoint.asynchronous={background}"]
    nursery.start(
        tmp_path / "a", *QUICK, *every, "checkpoint.keep_last=1", "checkpoint.keep_every=4", f"run.dir={run_dir}"
    )
    assert nursery.codes() == [0, 0], text_of(tmp_path / "a")
    assert saved(run_dir) == names(4, 6)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    stalls = {record["step"]: record["save_stall_s"] for record in records if "save_stall_s" in record}
    assert {3, 5} <= set(stalls) <= {3, 4, 5, 6} and all(stall > 0 for stall in stalls.values())
    log = (run_dir / "log.txt").read_text()
    assert log.count("saved ") == 3
    last = re.search(r"saves since the last record: training stood still for ([\d.]+) s, writing took ([\d.]+) s", log)
    assert last is not None and float(last[1]) > 0 and float(last[2]) > 0


def test_a_full_disk_stops_the_run_or_not_and_never_costs_the_last_checkpoint(
    nursery: Nursery, workspace: Path, tmp_path: Path
) -> None:
    """The disk's limit is that of the process on the size of files: writes fail half-way, in the kernel."""
    run_dir = workspace / "runs" / "full"
    common = [*QUICK, "schedule.total_steps=20", "checkpoint.interval=2", f"run.dir={run_dir}"]
    nursery.start(tmp_path / "good", *common, "train.steps=2")
    assert nursery.codes() == [0, 0], text_of(tmp_path / "good")

    nursery.start(tmp_path / "stop", *common, "train.steps=6", largest_file=100_000)
    assert nursery.codes() == [2, 2]
    said = text_of(tmp_path / "stop")
    assert said.count("error:") == 1 and "saving the checkpoint of step 4 failed: " in said and "File too large" in said
    assert f"the last complete one is {run_dir / 'checkpoints' / 'iter_0000002'}; make room" in said
    assert saved(run_dir) == names(2)

    go_on = ["checkpoint.on_failure=continue", "train.steps=6"]
    nursery.start(tmp_path / "continue", *common, *go_on, largest_file=100_000)
    assert nursery.codes() == [2, 2], text_of(tmp_path / "continue")  # of the last save nothing is left
    said = text_of(tmp_path / "continue")
    assert "training goes on (checkpoint.on_failure=continue)" in said and "step 6/6" in said
    assert "saving the checkpoint of step 6 failed" in said and saved(run_dir) == names(2)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(record.get("saves_failed", 0) for record in records) == 1

    nursery.start(tmp_path / "room", *common, "train.steps=6")
    assert nursery.codes() == [0, 0], text_of(tmp_path / "room")
    assert saved(run_dir) == names(2, 4, 6)


def test_a_directory_that_cannot_be_written(nursery: Nursery, workspace: Path, tmp_path: Path) -> None:
    """A directory of the kernel's own, which refuses root as well."""
    run_dir = workspace / "runs" / "readonly"
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoints").symlink_to("/sys/kernel")
    nursery.start(tmp_path / "a", *QUICK, "train.steps=2", f"run.dir={run_dir}")
    assert nursery.codes() == [2, 2]
    said = text_of(tmp_path / "a")
    assert said.count("error:") == 1 and "saving the checkpoint of step 2 failed: " in said
    assert "there is no earlier one; make room, or the directory writable" in said


def test_sigusr1_to_one_rank_saves_and_stops_all(nursery: Nursery, workspace: Path, tmp_path: Path) -> None:
    run_dir, folder = workspace / "runs" / "usr1", tmp_path / "a"
    pids = nursery.start(folder, *ENDLESS, f"run.dir={run_dir}")
    deadline = time.monotonic() + 120
    while "\nstep 2/" not in text_of(folder):
        assert time.monotonic() < deadline, text_of(folder)
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGUSR1)
    assert nursery.codes() == [143, 143], text_of(folder)
    log = (run_dir / "log.txt").read_text()
    assert "stopped by SIGUSR1 after step" in log and "saves since the last record: " in log
    validated = [int(step) for step in re.findall(r"validation after step (\d+):", log)]
    assert validated[0] == 0 and all(step % 20 == 0 for step in validated), "the rest of the time is the save's"
    assert find_checkpoint("auto", run_dir / "checkpoints") is not None


def test_a_time_limit_saves_and_stops(nursery: Nursery, workspace: Path, tmp_path: Path) -> None:
    """The time is that of the process, which has run out here when training starts: one step is done."""
    run_dir, folder = workspace / "runs" / "limit", tmp_path / "a"
    nursery.start(folder, *ENDLESS, "checkpoint.time_limit_minutes=0.01", f"run.dir={run_dir}")
    assert nursery.codes() == [143, 143], text_of(folder)
    assert "stopped by checkpoint.time_limit_minutes after step 1;" in text_of(folder)
    assert saved(run_dir) == names(1) and "validation after step 1" not in text_of(folder)
    assert "before training (nats a token), not measured since" in text_of(folder)
