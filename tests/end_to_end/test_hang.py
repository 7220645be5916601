"""A rank that hangs ends the whole run, named; a run that is only slow goes on. `test_rank_death.py` has the dead."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import torchrun
from tests.end_to_end.test_rank_death import LAUNCHERS, Run, start

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]
__all__ = ["start"]

HANG_TIMEOUT_S = 4
WATCHED = f"monitor.hang_timeout_s={HANG_TIMEOUT_S}"
ALLOWED_S = 40
"""Of the timeout, 10 s for an answer, and what a launcher takes to end."""

LOOPING = '''
"""pretrain.py, with one rank that is slow for a while, and then in an endless loop."""
import os, sys, time
from adamoe_dist.data import BatchStream
from adamoe_dist.training import pretrain

steps, original = 0, BatchStream.next_step

def next_step(stream):
    global steps
    steps += 1
    if os.environ["RANK"] == "1":
        if 2 <= steps < 5:
            time.sleep(float(os.environ["SLOW_S"]))
        while steps == 7:
            pass  # for ever
    return original(stream)

BatchStream.next_step = next_step
sys.exit(pretrain(sys.argv[1:]))
'''


@pytest.mark.parametrize(
    ("launcher", "victim"),
    [("deepspeed", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("torchrun", 0), ("torchrun", 1)])],
)
def test_a_stopped_rank_is_named_and_the_run_ends(start, tmp_path: Path, launcher: str, victim: int) -> None:
    run: Run = start([[*LAUNCHERS[launcher](2), WATCHED]])
    run.wait_for_steps()
    ranks = run.ranks()
    ranks[victim].send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    (done,) = run.finish(ranks)
    assert HANG_TIMEOUT_S < time.monotonic() - stopped_at < ALLOWED_S
    assert done.returncode == 1
    assert len(done.errors) == 1, "\n".join(done.errors)
    line = done.errors[0]
    assert line.startswith(f"error: rank {victim} on ") and "hangs (no progress for " in line
    assert "does not answer" in line
    if victim == 1:
        assert "1 other rank: waits in " in line and "adamoe_dist/" in line
        assert "File " in (tmp_path / "run" / "log.txt").read_text()
        heartbeat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
        assert heartbeat["phase"] == "stopped" and heartbeat["exit_code"] == 1 and heartbeat["step"] >= 5


@pytest.mark.slow
def test_a_loop_without_end_is_named_by_its_line_and_slow_steps_are_not(start, tmp_path: Path) -> None:
    """Three steps take 3/4 of the timeout each, more than it together."""
    script = tmp_path / "looping.py"
    script.write_text(LOOPING)
    command = [str(script) if part.endswith("pretrain.py") else part for part in torchrun(2)]
    run: Run = start([[*command, WATCHED]], SLOW_S=str(0.75 * HANG_TIMEOUT_S))
    (done,) = run.finish({}, timeout_s=150)
    assert done.returncode == 1
    assert "step 5/" in done.stdout
    assert len(done.errors) == 1, "\n".join(done.errors)
    line = done.errors[0]
    number = LOOPING.splitlines().index("        while steps == 7:") + 1
    assert line.startswith("error: rank 1 on ") and "is not in a collective: " in line
    assert any(f"looping.py:{n} in next_step" in line for n in (number, number + 1))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "in next_step" in log and "rank 0 on" in log and "waits in " in log
