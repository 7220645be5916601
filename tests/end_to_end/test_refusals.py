"""Bad input to the training command: exit code 2, one line, nothing built."""

import importlib.util
import shutil
import socket
from pathlib import Path

import pytest

from adamoe_dist.training import pretrain
from tests.end_to_end.conftest import deepspeed, one_process, run_command

pytestmark = pytest.mark.end_to_end


@pytest.fixture
def refused(workspace, monkeypatch, capfd):
    """Run the command in this process and return its one line of refusal."""

    def run(*arguments: str, world_size: int = 1) -> str:
        monkeypatch.chdir(workspace)
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        code = pretrain(["--config", "small.yaml", *arguments])
        lines = capfd.readouterr().err.splitlines()
        assert code == 2, lines
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and not any("Traceback" in line for line in lines), lines
        return errors[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "world_size", "expected"),
    [
        (["train.stepz=3"], 1, "unknown key train.stepz; did you mean train.steps?"),
        (["train.steps=lots"], 1, "train.steps='lots' must be a whole number"),
        (["moe.top_k=17"], 1, "moe.top_k=17 is more than the 16 experts"),
        (["parallel.expert=3"], 3, "parallel.expert=3 does not divide moe.num_experts=8"),
        (["parallel.expert=2"], 1, "does not divide the world size 1"),
        (["train.global_batch_size=10"], 4, "does not divide over 4"),
        (["data.tokenizer=nowhere"], 1, "nowhere"),
        (["data.train=[{path: nothing_train}]"], 1, "nothing_train"),
        (["train.global_batch_size=1000000", "train.micro_batch_size=1"], 1, "not enough for one batch"),
        (["model.sequence_length=10000000"], 1, "model.sequence_length"),
        (["checkpoint.resume=nowhere"], 1, "nowhere"),
        (["optimizer.implementation=apex"], 1, "optimizer.implementation=apex"),
        pytest.param(
            ["monitor.wandb.project=mine"],
            1,
            "monitor.wandb.project=mine needs the package wandb",
            marks=pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed"),
        ),
        (["train.precision=fp16"], 1, "train.precision=fp16 needs CUDA and there is none; use fp32 or bf16"),
        (
            [
                "data.prepare.input=[no/such/text]",
                "data.train=[{path: fresh_train}]",
                "data.validation=[]",
                "data.tokenizer=fresh_tokenizer",
            ],
            1,
            "no/such/text",
        ),
        (["--config", "missing.yaml"], 1, "--config missing.yaml: no such file"),
        (["--steps", "3"], 1, "unrecognized arguments: --steps"),
    ],
)
def test_refused_before_anything_is_built(refused, arguments: list[str], world_size: int, expected: str) -> None:
    assert expected in refused(*arguments, world_size=world_size)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.train=[{path: nothing_train}]"], "nothing_train"),
        (["data.validation=[{path: nothing_validation}]"], "nothing_validation"),
        (["data.tokenizer=nowhere"], "nowhere"),
        (["checkpoint.resume=nowhere"], "nowhere"),
        (["checkpoint.load_weights=nowhere"], "nowhere"),
        (["optimizer.implementation=apex"], "optimizer.implementation=apex"),
        (["run.dir=small.yaml"], "run.dir=small.yaml is a file"),
        (["checkpoint.resume=auto", "schedule.total_steps=1"], "schedule.total_steps=1 is less than train.steps=40"),
        (
            [
                "data.prepare.input=[no/such/text]",
                "data.train=[{path: fresh_train}]",
                "data.validation=[]",
                "data.tokenizer=fresh_tokenizer",
            ],
            "no/such/text",
        ),
        pytest.param(
            ["monitor.wandb.project=mine"],
            "monitor.wandb.project=mine needs the package wandb",
            marks=pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed"),
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(refused, workspace, arguments: list[str], expected: str) -> None:
    before = sorted(workspace.rglob("*"))
    assert expected in refused(*arguments, "--dry-run")
    assert sorted(workspace.rglob("*")) == before, "it writes nothing"


def test_tokenizer_that_did_not_prepare_the_data(workspace, refused) -> None:
    train_another = [
        "tools/train_tokenizer.py",
        "--input",
        str(workspace / "text"),
        "--vocab-size",
        "400",
        "--output",
        str(workspace / "other_tokenizer"),
    ]
    root = Path(__file__).resolve().parents[2]
    if not (workspace / "other_tokenizer").exists():
        assert run_command(["python", *train_another], root).returncode == 0
    message = refused("data.tokenizer=other_tokenizer")
    assert "data.train[0] was prepared with another tokenizer" in message


def test_port_in_use(workspace, refused, monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert f"MASTER_PORT={port} cannot be opened" in refused("run.dir=runs/port")


def test_run_directory_with_checkpoints_and_checkpoint_of_another_model(workspace, refused) -> None:
    source = ["--config", "small.yaml", "run.dir=runs/first", "train.steps=1", "train.validation_samples=4"]
    done = run_command(one_process(*source), workspace)
    assert done.returncode == 0, done.stderr
    assert "run.dir=runs/first already has checkpoints" in refused("run.dir=runs/first")
    assert "run.dir=runs/first already has checkpoints" in refused("run.dir=runs/first", "--dry-run")
    dry_seed = refused("run.dir=runs/first", "checkpoint.resume=auto", "run.seed=5", "--dry-run")
    assert "run.seed" in dry_seed
    other = refused("run.dir=runs/first", "checkpoint.resume=auto", "moe.num_experts=4", "model.hidden_size=64")
    assert "moe.num_experts" in other and "model.hidden_size" in other
    assert "run.seed" in refused("run.dir=runs/first", "checkpoint.resume=auto", "run.seed=5")
    again = ["run.dir=runs/first", "checkpoint.resume=auto"]
    assert "schedule.total_steps (where null, train.steps; " in refused(*again, "train.steps=2")
    blend = "data.train=[{path: corpus_train}, {path: corpus_validation}]"
    steady = refused(*again, "train.steps=2", "schedule.total_steps=1", "optimizer.learning_rate=0.1", blend)
    assert "optimizer.learning_rate is 0.003 there, 0.1 here; data.train is [corpus_train " in steady
    assert steady.endswith("checkpoint.allow_changes=[optimizer.learning_rate, data.train]")
    assert "model.hidden_size, which a continued run" in refused(*again, "checkpoint.allow_changes=[model.hidden_size]")
    assert "schedule.total_steps=1 is less than train.steps=2" in refused(
        "run.dir=runs/none_there", "checkpoint.resume=auto", "train.steps=2", "schedule.total_steps=1"
    )
    named = ["train.steps=2", "optimizer.learning_rate=0.1", blend, "train.validation_samples=4"]
    allow = "checkpoint.allow_changes=[optimizer.learning_rate, schedule.total_steps, data.train]"
    done = run_command(one_process("--config", "small.yaml", *again, *named, allow), workspace)
    assert done.returncode == 0, done.stderr
    assert "checkpoint.allow_changes: optimizer.learning_rate 0.003 -> 0.1\n" in done.stdout
    assert "checkpoint.allow_changes: schedule.total_steps 1 -> 2\n" in done.stdout
    assert "checkpoint.allow_changes: data.train [corpus_train " in done.stdout and "step 2/2" in done.stdout
    broken = workspace / "runs" / "broken_copy"
    shutil.copytree(workspace / "runs" / "first", broken)
    (broken / "checkpoints" / "iter_0000001" / "manifest.json").unlink()
    assert "broken_copy" in refused(f"checkpoint.resume={broken}", "run.dir=runs/new")


def test_under_a_launcher_rank_0_says_it_once_and_the_code_is_2(workspace) -> None:
    done = run_command(deepspeed(2, "--config", "small.yaml", "moe.top_k=99"), workspace)
    assert done.returncode == 2
    assert len(done.errors) == 1 and "moe.top_k=99" in done.errors[0]
    assert "Traceback" not in done.stderr


def test_under_a_launcher_a_refused_file_does_not_leave_ranks_waiting(workspace) -> None:
    done = run_command(deepspeed(2, "--config", "small.yaml", "data.tokenizer=nowhere"), workspace, timeout_s=90)
    assert done.returncode == 2
    assert len(done.errors) == 1 and "nowhere" in done.errors[0]
