"""Whole runs of launch/pretrain.py under each launcher."""

import json
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from adamoe_dist.training import pretrain
from tests.end_to_end.conftest import (
    REPOSITORY,
    Finished,
    deepspeed,
    metrics_of,
    one_process,
    run_command,
    torchrun,
)

pytestmark = pytest.mark.end_to_end

METRICS = [
    "step",
    "tokens_seen",
    "lm_loss",
    "balance_loss",
    "z_loss",
    "grad_norm",
    "learning_rate",
    "step_time_s",
    "tokens_per_second",
    "true_experts_per_token",
    "true_experts_per_token_min",
    "true_experts_per_token_max",
    "expert_max_over_mean",
    "null_share",
    "all_null_share",
    "score_entropy",
    "dispatch_rows",
    "dispatch_rows_same_rank",
    "dispatch_rows_same_node",
    "dispatch_rows_other_node",
    "dispatch_bytes",
    "dispatch_bytes_same_node",
    "dispatch_bytes_other_node",
    "dispatch_rows_undeduplicated",
    "expert_flops_saved",
    "memory_peak_gib",
]


def run(command: list[str], workspace: Path) -> Finished:
    done = run_command(command, workspace)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def unbroken(workspace: Path) -> tuple[Path, Finished]:
    """40 steps on two expert-parallel ranks under DeepSpeed's launcher."""
    done = run(deepspeed(2, "--config", "small.yaml", "run.dir=runs/unbroken", "monitor.sample_tokens=8"), workspace)
    return workspace / "runs" / "unbroken", done


def test_run_directory_has_what_scripts_rely_on(unbroken) -> None:
    run_dir, _ = unbroken
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["train"]["steps"] == 40 and config["moe"]["num_null_experts"] == 8
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["deepspeed"] and environment["world_size"] == 2
    assert "step 40/40" in (run_dir / "log.txt").read_text()
    assert list((run_dir / "tensorboard").glob("events*"))
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "40"
    assert (run_dir / "checkpoints" / "iter_0000040" / "manifest.json").is_file()


def test_metrics_are_those_of_the_interface_and_add_up(unbroken) -> None:
    run_dir, _ = unbroken
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [record["step"] for record in records if "validation_loss" in record] == [0, 20, 40]
    for record in records[1:]:
        assert set(METRICS) <= set(record)
        assert record["tokens_seen"] == record["step"] * 16 * 32
        load = record["true_experts_per_token"]
        assert load == pytest.approx(3 * (1 - record["null_share"]))
        assert record["expert_flops_saved"] == pytest.approx(1 - load / 2)
        assert 0 < record["dispatch_rows"] <= record["dispatch_rows_undeduplicated"] < 2 * 16 * 32 * load
        assert record["dispatch_bytes"] > record["dispatch_rows"] * 32 * 4
    assert records[-1]["validation_loss"] < records[0]["validation_loss"] - 0.5


def test_tensorboard_holds_the_same_numbers(unbroken) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = unbroken
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("loss/lm")}
    for record in metrics_of(run_dir)[1:]:
        assert written[record["step"]] == pytest.approx(record["lm_loss"], rel=1e-6)
    assert "layers/null_share/01" in events.Tags()["scalars"]
    for name, reduced, over_layers in (
        ("true_experts_per_token", "true_experts_per_token_min", min),
        ("true_experts_per_token", "true_experts_per_token_max", max),
        ("expert_max_over_mean", "expert_max_over_mean", max),
    ):
        layers = [[event.value for event in events.Scalars(f"layers/{name}/{layer:02d}")] for layer in range(2)]
        of_model = [record[reduced] for record in metrics_of(run_dir) if "lm_loss" in record]
        assert of_model == pytest.approx([over_layers(values) for values in zip(*layers, strict=True)], rel=1e-6)
    assert "sample/text_summary" in events.Tags()["tensors"]


def test_a_person_reads_the_result_at_the_end(unbroken) -> None:
    lines = [line for line in unbroken[1].stdout.splitlines() if not line.startswith("[")]
    assert any(line.startswith("step 5/40 | loss ") and " left " in line for line in lines)
    report = lines.index("run adamoe in runs/unbroken")
    facts = [line.strip().partition(": ")[0] for line in lines[report + 1 :] if line.startswith("  ")]
    assert facts[:6] == ["versions", "device", "kernels", "ranks", "places", "batch"]
    assert facts[-2:] == ["data", "checkpoints"] and len(facts) == len(set(facts))
    tail = "\n".join(lines[-8:])
    for expected in (
        "validation loss:",
        "bits per byte:",
        "unigram entropy",
        "load:",
        "un-deduplicated",
        "tensorboard",
    ):
        assert expected in tail
    assert "sample, continuing 'def '" in unbroken[1].stdout


def test_output_that_no_terminal_reads_is_plain_lines(unbroken) -> None:
    run_dir, done = unbroken
    shown = done.stdout + done.stderr
    assert not {"\r", "\x1b", "\u2588"} & set(shown + (run_dir / "log.txt").read_text())
    assert "Warning" not in shown
    warnings = [line for line in shown.splitlines() if "warning of" in line]
    assert len(warnings) == len(set(warnings)), "each once, from however many ranks"


def test_each_rank_has_a_log_of_its_own(unbroken) -> None:
    run_dir, _ = unbroken
    assert [file.name for file in run_dir.glob("logs/*")] == ["rank_0001.txt"]
    for rank, file in enumerate((run_dir / "log.txt", run_dir / "logs" / "rank_0001.txt")):
        lines = [line.split(" ", 2)[2] for line in file.read_text().splitlines()]
        host = re.escape(socket.gethostname())
        place = rf"rank {rank} of 2: {host}, process \d+, cpu, data {rank} of 2, expert {rank} of 2"
        assert len([line for line in lines if re.fullmatch(place, line)]) == 1
        assert f"rank {rank} ends after step 40 with exit code 0" in lines[-2:]


def test_a_bug_leaves_its_traceback_in_the_log(workspace, monkeypatch) -> None:
    """Also of a run of one process, which nobody watches."""
    monkeypatch.chdir(workspace)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # put back afterwards; a run sets them
        monkeypatch.delenv(name)
    monkeypatch.setattr("adamoe_dist.data.BatchStream.next_step", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(["--config", "small.yaml", "run.dir=runs/bug", "data.validation=[]"])
    log = (workspace / "runs" / "bug" / "log.txt").read_text()
    assert "Traceback" in log and "ZeroDivisionError" in log


def test_resume_gives_the_same_metrics_bit_for_bit(workspace, unbroken) -> None:
    """20 steps under torchrun, then 20 more under DeepSpeed's launcher."""
    small = ["--config", "small.yaml", "run.dir=runs/broken"]
    run(torchrun(2, *small, "train.steps=20", "schedule.total_steps=40"), workspace)
    run_dir = workspace / "runs" / "broken"
    assert metrics_of(run_dir) == metrics_of(unbroken[0])[:5]
    run(deepspeed(2, *small, "checkpoint.resume=auto"), workspace)
    assert metrics_of(run_dir) == metrics_of(unbroken[0])


def test_one_process_gives_the_same_training(workspace, unbroken) -> None:
    run(
        one_process(
            "--config",
            "small.yaml",
            "run.dir=runs/one",
            "run.deterministic=true",
            "train.steps=20",
            "schedule.total_steps=40",
        ),
        workspace,
    )
    sent = {"learning_rate", "step", "tokens_seen", *(field for field in METRICS if field.startswith("dispatch_"))}
    alone, pair = metrics_of(workspace / "runs" / "one"), metrics_of(unbroken[0])
    for mine, theirs in zip(alone[:3], pair[:3], strict=True):
        for name in set(mine) - sent:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["step"], name)
    assert all(record.get("dispatch_rows", 0) == 0 for record in alone)


def test_baseline_router_and_bf16_and_zero_2_run(workspace) -> None:
    changes = [
        "moe.router.type=topk",
        "moe.num_null_experts=0",
        "moe.top_k=2",
        "moe.router.balance.type=switch",
        "train.precision=bf16",
        "zero.stage=2",
        "train.steps=6",
    ]
    run(deepspeed(2, "--config", "small.yaml", "run.dir=runs/baseline", *changes), workspace)
    last = metrics_of(workspace / "runs" / "baseline")[-1]
    assert last["true_experts_per_token"] == 2.0 and last["null_share"] == 0.0
    annealed = 0.02 + (0.001 - 0.02) * 5 / 6
    assert last["balance_loss"] == pytest.approx(2 * annealed, rel=0.1)
    assert last["dispatch_rows"] == last["dispatch_rows_undeduplicated"] > 0


def test_weights_of_another_run_start_a_new_one(workspace, unbroken) -> None:
    done = run(
        one_process(
            "--config",
            "small.yaml",
            "run.dir=runs/tuned",
            "run.seed=99",
            "train.steps=2",
            f"checkpoint.load_weights={unbroken[0]}",
        ),
        workspace,
    )
    assert "starting from the weights of" in done.stdout
    first = metrics_of(workspace / "runs" / "tuned")[0]
    assert first["validation_loss"] == pytest.approx(metrics_of(unbroken[0])[-1]["validation_loss"], rel=1e-5)


def test_sigterm_saves_and_exits_143(workspace) -> None:
    command = one_process("--config", "small.yaml", "run.dir=runs/stopped", "train.steps=100000")
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    for line in process.stdout:
        if line.startswith("step 5/") or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output
    pointer = workspace / "runs" / "stopped" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(pointer.read_text()) >= 5


def test_nan_stops_with_exit_code_3_and_names_step_and_batch(workspace) -> None:
    done = run_command(
        one_process("--config", "small.yaml", "run.dir=runs/nan", "optimizer.learning_rate=1e30", "train.steps=9"),
        workspace,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    (message,) = done.errors
    assert "of step" in message and "samples" in message


def test_dry_run_and_print_config(workspace) -> None:
    done = run(one_process("--config", "small.yaml", "--dry-run"), workspace)
    for expected in ("ranks: 1", "batch: 16 samples", "parameters:", "training state a rank", "MFLOP a token"):
        assert expected in done.stdout
    printed = run(one_process("--config", "small.yaml", "--print-config", "moe.top_k=2"), workspace).stdout
    (workspace / "printed.yaml").write_text(printed)
    again = run(one_process("--config", "printed.yaml", "--print-config"), workspace).stdout
    assert again == printed and yaml.safe_load(printed)["moe"]["top_k"] == 2
    assert not (workspace / "runs" / "adamoe").exists()


def test_default_configuration_is_the_quickstart(tmp_path) -> None:
    done = run_command(one_process("--dry-run"), tmp_path)
    assert done.returncode == 0, done.stderr
    quickstart = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    assert f"batch: {quickstart['train']['global_batch_size']} samples" in done.stdout
