"""tools/convert_checkpoint.py as a user runs it, between two runs of the training command."""

import math
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPOSITORY, Finished, metrics_of, one_process, run_command

pytestmark = pytest.mark.end_to_end

SHORT = ["--config", "small.yaml", "train.validation_samples=4", "monitor.log_interval=1", "monitor.sample_tokens=0"]


def convert(workspace: Path, *arguments: str) -> Finished:
    return run_command([sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), *arguments], workspace)


def train(workspace: Path, *arguments: str) -> None:
    done = run_command(one_process(*SHORT, *arguments), workspace)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_vanilla_run_goes_on_with_null_experts(workspace: Path) -> None:
    train(
        workspace,
        "run.dir=runs/vanilla",
        "train.steps=2",
        "schedule.total_steps=8",
        "moe.num_null_experts=0",
        "moe.top_k=2",
    )
    asked = ["--num-null-experts", "8", "--top-k", "3"]
    done = convert(workspace, "set-null-experts", "--from", "runs/vanilla", "--to", "runs/converted", *asked)
    assert done.returncode == 0 and not done.errors, done.stderr
    summary, remedy = done.stdout.splitlines()
    assert "null experts 0 -> 8, top-k 2 -> 3, null rows: copy" in summary
    prefix, settings = remedy.split(": ", 1)
    assert prefix == "continue with"
    assert settings.startswith("checkpoint.resume=runs/converted/iter_0000002 moe.num_null_experts=8 moe.top_k=3")
    train(workspace, "run.dir=runs/adaptive", "train.steps=4", "schedule.total_steps=8", *settings.split())
    before, after = metrics_of(workspace / "runs" / "vanilla"), metrics_of(workspace / "runs" / "adaptive")
    assert [line["step"] for line in after] == [3, 4]
    assert after[0]["tokens_seen"] == before[-1]["tokens_seen"] * 3 // 2
    assert all(math.isfinite(line["lm_loss"]) and 0 < line["null_share"] < 1 for line in after)

    converted = workspace / "runs" / "converted" / "iter_0000002"
    inspected = convert(workspace, "inspect", "--from", "runs/converted", "--verify")
    assert inspected.returncode == 0 and not inspected.errors, inspected.stderr
    assert f"{converted}: step 2, 1024 tokens seen" in inspected.stdout
    content = bytearray((converted / "__0_0.distcp").read_bytes())
    content[1000] ^= 1
    (converted / "__0_0.distcp").write_bytes(content)
    damaged = convert(workspace, "inspect", "--from", "runs/converted", "--verify")
    assert damaged.returncode == 2 and damaged.stdout == ""
    assert len(damaged.errors) == 1
    assert damaged.errors[0].startswith(
        f"error: {converted / '__0_0.distcp'} was changed or damaged after it was saved"
    )
