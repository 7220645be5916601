"""Builds of C++ that were killed, or go on, with the lock files that torch uses."""

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path

import pytest

from adamoe_dist.platform import building_alone
from adamoe_dist.platform.extensions import directory


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def build_for_ever(started: Path) -> None:
    """What torch leaves when it is killed in the middle of a build."""
    from torch.utils.file_baton import FileBaton

    with building_alone() as place:
        (place / "cpu_adam").mkdir(exist_ok=True)
        FileBaton(str(place / "cpu_adam" / "lock")).try_acquire()
        started.touch()
        time.sleep(600)


def begin_building(at: Path) -> mp.Process:
    process = mp.get_context("fork").Process(target=build_for_ever, args=(at,), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not at.exists():
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)
    return process


def test_a_build_that_was_killed_holds_up_nobody(tmp_path: Path) -> None:
    builder = begin_building(tmp_path / "started")
    assert (directory() / "cpu_adam" / "lock").exists()
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    with building_alone() as place:
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(place)
        assert not (place / "cpu_adam" / "lock").exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_a_build_that_goes_on_is_waited_for(tmp_path: Path) -> None:
    builder = begin_building(tmp_path / "started")
    waiting = mp.get_context("fork").Process(target=enter_and_leave, args=(tmp_path / "entered",), daemon=True)
    waiting.start()
    time.sleep(1)
    assert not (tmp_path / "entered").exists() and (directory() / "cpu_adam" / "lock").exists()
    os.kill(builder.pid, signal.SIGKILL)
    waiting.join(timeout=60)
    assert (tmp_path / "entered").exists()
    builder.join()


def enter_and_leave(entered: Path) -> None:
    with building_alone():
        entered.touch()
