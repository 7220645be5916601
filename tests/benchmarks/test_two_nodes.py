"""Two network namespaces come up, a short run goes through them, and nothing of them is left."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.commands import REPOSITORY, benchmark, environment
from tests.namespaces import needs_namespaces

pytestmark = [pytest.mark.distributed, pytest.mark.end_to_end]
Wait = Callable[["subprocess.Popen[str]", Path], list[int]]
SHORT = ["--tokens", "64", "--sequence", "32", "--layers", "1", "--hidden", "64", "--expert-hidden", "32"]


def namespaces(process: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines() if line.startswith(f"adamoe-{process}-")]


def inside(namespace: str) -> list[int]:
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in pids.stdout.split()]


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "two_nodes.py"), *SHORT, *arguments]
    variables = environment(TMPDIR=str(folder))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


@needs_namespaces
def test_a_short_run_over_a_limited_link(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    result = tmp_path / "a.json"
    process = start(tmp_path / "work", "--rates", "50mbit", "--pairs", "1", "--steps", "1", "--json", str(result))
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    assert "| link 50mbit |" in output and "ratio of exchange times / ratio of rows" in output
    ours, megatrons = json.loads(result.read_text())["runs"]
    assert 0 < ours["rows"] < megatrons["rows"]
    for run in (ours, megatrons):
        assert 0 < run["exchange_s"] < run["step_s"]
        least_s = 4 * run["rows"] / 2 * 64 * 4 / (50e6 / 8)  # there and back, forward and backward, both ways at once
        assert run["exchange_s"] > 0.1 * least_s
    assert namespaces(process.pid) == []
    assert list((tmp_path / "work").glob("two_nodes.*")) == []


def wait_for_steps(process: "subprocess.Popen[str]", folder: Path) -> list[int]:
    """Wait until the nodes train, and return what runs on them."""
    while not any(path.stat().st_size for path in folder.glob("two_nodes.*/run/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    names = namespaces(process.pid)
    assert len(names) == 2
    found = [inside(name) for name in names]
    assert all(found)
    return [pid for pids in found for pid in pids]


def wait_for_namespace(process: "subprocess.Popen[str]", _: Path) -> list[int]:
    """Wait until the first namespace is there."""
    while not (names := namespaces(process.pid)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return [pid for name in names for pid in inside(name)]


@needs_namespaces
@pytest.mark.slow
@pytest.mark.parametrize(("number", "wait"), [(signal.SIGTERM, wait_for_steps), (signal.SIGINT, wait_for_namespace)])
def test_nothing_is_left_after_a_signal(tmp_path: Path, number: signal.Signals, wait: Wait) -> None:
    process = start(tmp_path, "--rates", "50mbit", "--pairs", "1", "--steps", "100000", "--timeout", "200")
    try:
        started = wait(process, tmp_path)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert namespaces(process.pid) == []
    assert [pid for pid in started if is_running(pid)] == []
    assert list(tmp_path.glob("two_nodes.*")) == []


def test_missing_tools_are_named_in_one_line() -> None:
    done = benchmark("two_nodes.py", PATH=str(Path(sys.executable).parent))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and ("root" in errors[0] or "iproute2" in errors[0])
