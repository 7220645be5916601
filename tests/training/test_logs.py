"""Who says what where: rank 0's console and file, and the files of other ranks."""

import fcntl
import logging
import os
import pty
import struct
import termios
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from adamoe_dist.console import fail
from adamoe_dist.launcher import Launch
from adamoe_dist.training.logs import Logs, rank_log

OURS = logging.getLogger("adamoe_dist.training.some_room")


def lines_of(run_dir: Path, rank: int) -> list[str]:
    return rank_log(run_dir, rank).read_text().splitlines()


def test_rank_0_shows_facts_and_keeps_everything(tmp_path, capsys) -> None:
    with Logs(Launch(0, 0, 4)) as logs:
        OURS.info("before the file")
        logs.open_file(tmp_path)
        OURS.info("step 1")
        OURS.warning("warning: a bad step")
        OURS.debug("a traceback")
    assert capsys.readouterr().out.splitlines() == ["before the file", "step 1", "warning: a bad step"]
    log = "\n".join(lines_of(tmp_path, 0))
    assert all(text in log for text in ("before the file", "step 1", "a bad step", "a traceback"))
    assert not (tmp_path / "logs").exists()


def test_another_rank_has_a_file_only_when_it_has_something_to_say(tmp_path, capsys) -> None:
    with Logs(Launch(7, 3, 8)) as logs:
        logs.open_file(tmp_path)
        OURS.info("what every rank knows")
        OURS.debug("what rank 0's file has")
        assert list(tmp_path.iterdir()) == []
        OURS.warning("my disk is slow")
        OURS.error("my disk is full")
        OURS.debug("Traceback of mine", extra={"is_own": True})
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == "rank 7: my disk is full\n"
    assert rank_log(tmp_path, 7) == tmp_path / "logs" / "rank_0007.txt"
    said = [line.split(" ", 2)[2] for line in lines_of(tmp_path, 7)]
    assert said == ["my disk is slow", "my disk is full", "Traceback of mine"]


@pytest.mark.parametrize("rank", [0, 3])
def test_warnings_of_libraries_come_once_and_only_from_rank_0(tmp_path, capsys, rank: int) -> None:
    library = logging.getLogger("some_library.part")
    handler = logging.StreamHandler()  # as DeepSpeed and transformers add one
    library.handlers, library.propagate = [handler], False
    with Logs(Launch(rank, 0, 4)) as logs, warnings.catch_warnings():
        warnings.simplefilter("always")
        library.warning("use %s", "that")
        logs.open_file(tmp_path)
        for _ in range(3):
            library.warning("use %s", "that")
            warnings.warn("old\nand grey", FutureWarning, stacklevel=1)
        library.warning("use %s", "this")
        library.info("not of interest")
    expected = [
        "warning of some_library: use that",
        "warning of test_logs: old and grey",
        "warning of some_library: use this",
    ]
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.splitlines() == (expected if rank == 0 else [])
    said = [line.split(" ", 2)[2] for line in lines_of(tmp_path, rank)]
    assert len(said) == 3 and all(line.startswith(text) for line, text in zip(said, expected, strict=True)), said
    assert "FutureWarning at " in said[1] and "test_logs.py:" in said[1]
    assert library.handlers == [handler] and not library.propagate, "as it was before"


def test_a_file_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, capsys) -> None:
    (tmp_path / "logs").write_text("a file in the place of the directory")
    with Logs(Launch(1, 1, 2)) as logs:
        logs.open_file(tmp_path)
        OURS.warning("first")
        OURS.warning("second")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "rank_0001.txt is not written" in line


def test_too_many_different_warnings(tmp_path, capsys) -> None:
    with Logs(Launch(0, 0, 1)) as logs:
        logs.open_file(tmp_path)
        for number in range(1100):
            logging.getLogger("noisy").warning("number %d", number)
        logging.getLogger("noisy").error("broken")
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1002 and "too many different ones" in shown[1000] and shown[1001] == "error of noisy: broken"


def test_bar_is_on_the_terminal_only(tmp_path, monkeypatch) -> None:
    """Lines stand above it, cut to the terminal's width; the file has them whole."""
    from adamoe_dist.training.display import Field, Pace, ProgressBar, ProgressLine

    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 48, 0, 0))
    line = ProgressLine((Field("step 1/4"), Field("x" * 60, 1), Field("left 0:03")))
    trainer = SimpleNamespace(rank=0, step=0, config=SimpleNamespace(train=SimpleNamespace(steps=4)))
    with os.fdopen(slave, "w", buffering=1) as terminal, monkeypatch.context() as patch, Logs(Launch(0, 0, 1)) as logs:
        patch.setattr("shutil.get_terminal_size", lambda *_, **__: os.get_terminal_size(slave))
        patch.setattr("sys.stdout", terminal)
        patch.setattr("sys.stderr", terminal)
        logs.open_file(tmp_path)
        pace = Pace()
        bar = ProgressBar(pace)
        bar.on_start(trainer)
        for step in (1, 2):
            trainer.step = step
            pace.note(1.0, now=None)
            bar.after_step(trainer, SimpleNamespace(lm_loss=2.5))
            OURS.info("%s", line, extra={"fitted": line.fitted})
        fail("gone")
        bar.close()
        seen = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "step 2/4, loss 2.5000, left " in seen
    assert seen.count("step 1/4 | left 0:03\r\n") == 2 and "xxx" not in seen
    assert "\r\x1b[Kerror: gone\r\n" in seen
    said = lines_of(tmp_path, 0)
    assert len(said) == 2 and all(str(line) in one for one in said) and "\r" not in "".join(said)


def test_no_bar_in_a_pipe(tmp_path, capfd) -> None:
    from adamoe_dist.training.display import Pace, ProgressBar

    bar = ProgressBar(Pace())
    trainer = SimpleNamespace(rank=0, step=0, config=SimpleNamespace(train=SimpleNamespace(steps=4)))
    bar.on_start(trainer)
    bar.after_step(trainer, SimpleNamespace(lm_loss=2.5))
    bar.close()
    fail("gone")
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == "error: gone\n"
