"""A rank that dies ends the whole run: every process gone within 60 s, with an exit code and the cause."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import REPOSITORY, Finished, deepspeed, environment_of_commands, free_port, torchrun

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]

LAUNCHERS = {"deepspeed": deepspeed, "torchrun": torchrun}
ALLOWED_S = 60
SHARED = ["model.num_layers=1", "train.steps=100000", "train.validation_samples=8", "monitor.tensorboard=false"]

FAILING = '''
"""pretrain.py, with one rank that fails at its third step."""
import os, sys
from adamoe_dist.data import BatchStream
from adamoe_dist.errors import UserError
from adamoe_dist.training import pretrain

steps, original = 0, BatchStream.next_step

def next_step(stream):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == os.environ["FAILING_RANK"]:
        if "REFUSES" in os.environ:
            raise UserError("data.train: corpus_train cannot be read")
        raise ZeroDivisionError("a bug")
    return original(stream)

BatchStream.next_step = next_step
sys.exit(pretrain(sys.argv[1:]))
'''


class Run:
    """One or more launchers, each with its output in files."""

    def __init__(self, commands: list[list[str]], workspace: Path, folder: Path, **variables: str) -> None:
        self.outputs = [folder / f"out{number}" for number in range(len(commands))]
        self.launchers = []
        for command, path in zip(commands, self.outputs, strict=True):
            with path.open("w") as out, path.with_suffix(".err").open("w") as errors:
                self.launchers.append(
                    subprocess.Popen(
                        command, cwd=workspace, env=environment_of_commands(variables), stdout=out, stderr=errors
                    )
                )

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank."""
        found = {}
        for launcher in self.launchers:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                environment = process.environ()
                if "RANK" in environment and process.cmdline()[1:2] != ["-m"]:
                    found[int(environment["RANK"])] = process
        return found

    def wait_for_steps(self) -> None:
        deadline = time.monotonic() + 150
        while not any("\nstep 5/" in path.read_text() for path in self.outputs):
            assert all(launcher.poll() is None for launcher in self.launchers), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def finish(self, ranks: dict[int, psutil.Process], timeout_s: float = ALLOWED_S) -> list[Finished]:
        """Wait for launchers and ranks to be gone, and return what each launcher's console showed."""
        deadline = time.monotonic() + timeout_s
        codes = [launcher.wait(max(1.0, deadline - time.monotonic())) for launcher in self.launchers]
        _, alive = psutil.wait_procs(list(ranks.values()), timeout=max(1.0, deadline - time.monotonic()))
        assert not alive
        pairs = zip(codes, self.outputs, strict=True)
        return [Finished(code, path.read_text(), path.with_suffix(".err").read_text()) for code, path in pairs]

    def text(self) -> str:
        return "\n".join(p.read_text()[-2000:] + p.with_suffix(".err").read_text()[-3000:] for p in self.outputs)

    def stop(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                children = psutil.Process(launcher.pid).children(recursive=True)
                launcher.kill()
                for child in children:
                    child.kill()
                launcher.wait()


@pytest.fixture
def start(workspace: Path, tmp_path: Path) -> Iterator[object]:
    runs: list[Run] = []

    def begin(commands: list[list[str]], **variables: str) -> Run:
        commands = [[*command, "--config", "small.yaml", f"run.dir={tmp_path}/run", *SHARED] for command in commands]
        runs.append(Run(commands, workspace, tmp_path, **variables))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


@pytest.mark.parametrize(
    ("launcher", "world_size", "victim"),
    [
        ("deepspeed", 4, 2),
        pytest.param("torchrun", 2, 1, marks=pytest.mark.slow),
        pytest.param("deepspeed", 2, 0, marks=pytest.mark.slow),
        ("torchrun", 4, 0),
    ],
)
def test_a_killed_rank(start, launcher: str, world_size: int, victim: int) -> None:
    run = start([LAUNCHERS[launcher](world_size)])
    run.wait_for_steps()
    ranks = run.ranks()
    assert sorted(ranks) == list(range(world_size))
    ranks[victim].kill()
    (done,) = run.finish(ranks)
    assert done.returncode not in (0, None)
    (line,) = done.errors
    assert line.startswith(f"error: rank {victim} on ") and "killed" in line
    assert "Connection closed by peer" not in done.stderr


def failing(command: list[str], folder: Path) -> list[str]:
    """The same command with a rank that fails."""
    script = folder / "failing.py"
    script.write_text(FAILING)
    return [str(script) if part.endswith("pretrain.py") else part for part in command]


@pytest.mark.parametrize(
    ("launcher", "world_size", "victim"),
    [
        ("deepspeed", 2, 1),
        pytest.param("torchrun", 4, 3, marks=pytest.mark.slow),
        pytest.param("torchrun", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_rank(start, tmp_path: Path, launcher: str, world_size: int, victim: int) -> None:
    run = start([failing(LAUNCHERS[launcher](world_size), tmp_path)], FAILING_RANK=str(victim))
    (done,) = run.finish({}, timeout_s=150)
    assert done.returncode == 1
    (line,) = done.errors
    assert line.startswith(f"error: rank {victim} on ") and line.endswith("left: ZeroDivisionError: a bug")
    assert done.stderr.count("raise ZeroDivisionError") == 1, "one traceback"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"rank {victim} on" in log and "Traceback" in log and "in next_step" in log
    if victim:
        own = (tmp_path / "run" / "logs" / f"rank_{victim:04d}.txt").read_text()
        assert "raise ZeroDivisionError" in own
        assert len(list((tmp_path / "run" / "logs").iterdir())) == 1, "the others only lost a connection"


def test_a_refusal_on_one_rank_keeps_its_exit_code(start, tmp_path: Path) -> None:
    run = start([failing(deepspeed(2), tmp_path)], FAILING_RANK="1", REFUSES="1")
    (done,) = run.finish({}, timeout_s=150)
    assert done.returncode == 2
    (line,) = done.errors
    assert line.startswith("error: rank 1 on ") and "corpus_train cannot be read" in line
    assert "Traceback" not in done.stderr


def test_a_rank_of_the_other_node(start, workspace: Path, tmp_path: Path) -> None:
    """Each launcher looks after its own node only; the one whose ranks live must go as well."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    port = str(free_port())
    shared = ["-H", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    script = str(REPOSITORY / "launch" / "pretrain.py")
    run = start([["deepspeed", *shared, "--node_rank", str(node), script] for node in (0, 1)])
    run.wait_for_steps()
    ranks = run.ranks()
    ranks[1].kill()
    first, second = run.finish(ranks)
    assert first.returncode == 1 and second.returncode != 0
    assert [line.startswith("error: rank 1 on ") for line in first.errors] == [True]


def test_a_rank_that_dies_before_the_groups_are_there(start, tmp_path: Path) -> None:
    """Rank 0 waits for it where no collective would ever time out."""
    run = start([deepspeed(2)])
    deadline = time.monotonic() + 100
    while len(run.ranks()) < 2:
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.02)
    ranks = run.ranks()
    ranks[1].kill()
    (done,) = run.finish(ranks)
    assert done.returncode not in (0, None)
