"""tools/plan.py as a user calls it, and rows against runs."""

import json
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPOSITORY, Finished, metrics_of, one_process, run_command, torchrun

pytestmark = pytest.mark.end_to_end


def plan(workspace: Path, *arguments: str) -> Finished:
    cluster = ["--config", "small.yaml", "--gpu", "cpu", "--nodes", "1"]
    return run_command([sys.executable, str(REPOSITORY / "tools" / "plan.py"), *cluster, *arguments], workspace)


def test_a_plan_in_words_as_json_and_as_files(workspace, tmp_path: Path) -> None:
    written = ["--write-config", str(tmp_path / "planned.yaml"), "--write-slurm", str(tmp_path / "job")]
    done = plan(workspace, "--gpus-per-node", "4", "--search", "--top", "3", *written)
    assert done.returncode == 0, done.stderr
    for part in ("| 1 |", "memory of the fullest rank", "bottleneck:", "matmul_efficiency=0.6", "layouts refused"):
        assert part in done.stdout, done.stdout
    dry = run_command(
        [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "--config", str(tmp_path / "planned.yaml"),
         "--dry-run"],
        workspace,
        environment={"WORLD_SIZE": "4", "RANK": "0"},
    )  # fmt: skip
    assert dry.returncode == 0 and "dry run: nothing was trained" in dry.stdout, dry.stderr
    answer = json.loads(plan(workspace, "--gpus-per-node", "2", "--json").stdout)
    text = run_command(one_process("--config", "small.yaml", "--dry-run"), workspace, environment={"WORLD_SIZE": "2"})
    rows = answer["dispatch_rows_same_node"] + answer["dispatch_rows_other_node"]
    assert f"dispatch: about {rows:.0f} rows to other ranks a step" in text.stdout
    assert f"parameters: {answer['parameters_total']:,} total" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--gpus-per-node", "3"], "global_batch_size=16"),
        (["--gpus-per-node", "2", "--memory-GiB", "0.01"], "GiB too much"),
        (["--gpus-per-node", "2", "--search", "--memory-GiB", "0.01"], "of all layouts the smallest"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0"),
        (["--gpus-per-node", "2", "--load", "4"], "--load 4"),
        (["--gpus-per-node", "2", "--inter-node-GBps", "0"], "--inter-node-GBps 0"),
        (["--gpus-per-node", "2", "--write-slurm", "job"], "--write-config"),
        (["--gpus-per-node", "2", "--measured", "small.yaml"], "--measured small.yaml"),
        (["--gpus-per-node", "2", "--assume", "speed=1"], "no such assumption"),
        (["--gpus-per-node", "2", "model.hiden_size=3"], "model.hidden_size"),
    ],
)
def test_refusals(workspace, arguments: list[str], why: str) -> None:
    done = plan(workspace, *arguments)
    assert done.returncode == 2 and len(done.errors) == 1 and why in done.errors[0], (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr


def test_no_torch_is_loaded(workspace) -> None:
    """A plan takes a fraction of a second; torch alone would take two."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['plan.py', '--config', 'small.yaml', '--nodes', '2', '--gpus-per-node', '2']\n"
        f"try:\n    runpy.run_path({str(REPOSITORY / 'tools' / 'plan.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_command([sys.executable, "-c", program], workspace)
    assert done.returncode == 0, done.stderr


EMPTY_PROCESS = (
    "from adamoe_dist import platform\nplatform.prepare()\nimport adamoe_dist.training.session\n"
    "print(platform.peak_memory_gib())"
)
"""What a rank's process holds before it has a model, GiB: with a torch built for CUDA twice as much as without."""


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "band"), [(2, 0.02), pytest.param(4, 0.03, marks=pytest.mark.slow)])
def test_rows_of_a_run(workspace, tmp_path: Path, ranks: int, band: float) -> None:
    """Planned from the load that the run had after its warm-up, rows are near its own, bytes too.

    Experts of a small router are not used alike: in runs of the quickstart's size it is 0 to 2.3 %. With a high
    learning rate the first steps send most tokens to a few experts, of which no plan knows.
    """
    options = ["train.steps=24", "train.global_batch_size=24", "train.validation_interval=null", "data.validation=[]"]
    options += ["model.hidden_size=128", "model.num_attention_heads=4", "model.sequence_length=128"]
    options += ["monitor.log_interval=1", "monitor.tensorboard=false", "monitor.sample_tokens=0"]
    options += ["train.micro_batch_size=6", "moe.expert_hidden_size=128", "optimizer.learning_rate=0.0003"]
    run = tmp_path / "run"
    done = run_command(torchrun(ranks, "--config", "small.yaml", f"run.dir={run}", *options), workspace)
    assert done.returncode == 0, done.stderr
    records = [record for record in metrics_of(run) if "dispatch_rows" in record]
    late = records[len(records) // 2 :]
    measured = {name: sum(r[name] for r in late) / len(late) for name in ("dispatch_rows", "dispatch_bytes")}
    empty = run_command([sys.executable, "-c", EMPTY_PROCESS], workspace)
    overhead = ["--assume", f"memory_overhead_gib={empty.stdout.strip()}"]
    measured_run = ["--measured", f"{run}/metrics.jsonl", *overhead, "--json"]
    found = plan(workspace, *options, "--gpus-per-node", str(ranks), *measured_run)
    answer = json.loads(found.stdout)
    assert answer["dispatch_rows_other_node"] == 0
    assert answer["dispatch_rows_same_node"] == pytest.approx(measured["dispatch_rows"], rel=band)
    assert answer["dispatch_bytes"] == pytest.approx(measured["dispatch_bytes"], rel=band)
    last = metrics_of(run, drop=set())[-1]
    # Of so small a model the process is most: this says that plan and metric are of the same thing.
    assert answer["memory_gib"] == pytest.approx(last["memory_peak_gib"], rel=0.35)
