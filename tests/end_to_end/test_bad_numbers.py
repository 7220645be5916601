"""A run whose numbers go wrong for good stops, and what it leaves can be gone on from."""

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import one_process, run_command

pytestmark = pytest.mark.end_to_end

SPOILED = '''
"""pretrain.py, whose losses are NaN in the third step, and in all from the seventh on."""
import sys
from adamoe_dist.parallel import Schedule
from adamoe_dist.training import pretrain

steps, original = 0, Schedule.run

def run(schedule, *arguments):
    global steps
    steps += 1
    return original(schedule, *arguments) * (float("nan") if steps == 3 or steps >= 7 else 1.0)

Schedule.run = run
sys.exit(pretrain(sys.argv[1:]))
'''


def test_a_run_that_went_bad_is_gone_on_from_where_it_was_good(workspace: Path, tmp_path: Path) -> None:
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED)
    run_dir = tmp_path / "run"
    arguments = ["--config", "small.yaml", f"run.dir={run_dir}", "train.steps=12", "monitor.log_interval=1"]
    arguments += ["monitor.tensorboard=true", "train.validation_samples=8"]
    done = run_command([sys.executable, str(script), *arguments], workspace)
    assert done.returncode == 3, done.stdout + done.stderr
    (message,) = done.errors
    assert (
        "the loss of step 9 is nan; its batch is samples 128 to 143 of the data order (corpus_train 128 to" in message
    )
    assert "train.max_bad_steps=3" in message
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert [line.split(";")[0] for line in warnings] == [
        f"warning: the loss of step {step} is nan" for step in (3, 7, 8)
    ]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("lm_loss", 0) is None] == [3, 7, 8, 9]
    assert [r.get("bad_steps") for r in records[1:]] == [None, None, 1, 1, 1, 1, 2, 3, 4]
    heartbeat = json.loads((run_dir / "heartbeat.json").read_text())
    assert (heartbeat["phase"], heartbeat["exit_code"], heartbeat["step"]) == ("stopped", 3, 9)

    again = run_command(one_process(*arguments, "checkpoint.resume=auto"), workspace)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "iter_0000009 after step 9" in again.stdout
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records[-3:]] == [10, 11, 12]
    assert all(record["lm_loss"] < records[1]["lm_loss"] for record in records[-3:])
    heartbeat = json.loads((run_dir / "heartbeat.json").read_text())
    assert (heartbeat["phase"], heartbeat["exit_code"], heartbeat["step"]) == ("finished", 0, 12)
