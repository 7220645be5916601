"""Whole runs of launch/finetune.py: from a checkpoint, on examples, broken off and continued."""

import json
import pydoc_data.topics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from adamoe_dist.training import finetune, pretrain
from tests.end_to_end.conftest import REPOSITORY, Finished, deepspeed, metrics_of, one_process, run_command, torchrun

pytestmark = pytest.mark.end_to_end

COMMON = [
    "checkpoint.load_weights=runs/model",
    "data.train=[{path: train.jsonl, weight: 1}]",
    "data.validation=[{path: held_out.jsonl}]",
    "model.sequence_length=48",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "monitor.log_interval=1",
    "monitor.sample_tokens=0",
    "monitor.tensorboard=false",
    "finetune.too_long=truncate",
]
EXAMPLES = 36
STEPS = 9


def fine_tuning(command: list[str]) -> list[str]:
    return [part.replace("pretrain.py", "finetune.py") for part in command]


def run(command: list[str], workspace: Path) -> str:
    done = run_command(command, workspace)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def started(workspace: Path) -> Path:
    """The workspace with examples, and a model that was trained for two steps."""
    topics = sorted(pydoc_data.topics.topics.items())
    lines = [{"prompt": f"About {name}: ", "completion": text[: 20 + len(name)]} for name, text in topics]
    for name, part in (("train.jsonl", lines[:EXAMPLES]), ("held_out.jsonl", lines[EXAMPLES : EXAMPLES + 7])):
        (workspace / name).write_text("".join(json.dumps(line) + "\n" for line in part))
    shape = ["model.hidden_size=48", "moe.num_null_experts=4", "train.steps=2", "monitor.sample_tokens=0"]
    run(one_process("--config", "small.yaml", "run.dir=runs/model", *shape), workspace)
    return workspace


@pytest.fixture(scope="module")
def unbroken(started: Path) -> Path:
    run(fine_tuning(deepspeed(2, *COMMON, "run.dir=runs/unbroken_ft")), started)
    return started / "runs" / "unbroken_ft"


def test_the_model_is_the_checkpoints_and_the_length_follows_from_epochs(unbroken: Path) -> None:
    config = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert config["model"]["hidden_size"] == 48 and config["moe"]["num_null_experts"] == 4
    assert config["data"]["tokenizer"] == "tokenizer"
    assert config["train"]["steps"] == STEPS and config["moe"]["router"]["balance"]["anneal_steps"] == 5
    log = (unbroken / "log.txt").read_text()
    assert "model.*, moe.* and data.tokenizer are those of runs/model/checkpoints/iter_0000002" in log
    assert "but for: model.sequence_length, moe.router.balance.coefficient" in log
    assert f"train.jsonl: {EXAMPLES} examples" in log
    in_effect = next(line for line in log.splitlines() if "moe.router is in effect with" in line)
    assert "balance.anneal=step" in in_effect and "balance.anneal_steps=5" in in_effect


def test_metrics_count_what_is_learnt_and_read(unbroken: Path) -> None:
    records = metrics_of(unbroken)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    read = [b["tokens_seen"] - a["tokens_seen"] for a, b in pairwise(records)]
    for tokens, record in zip(read, records[1:], strict=True):
        assert 0 < record["loss_tokens"] < tokens < 8 * 48
    # Two layers count every real token once: of three slots each, null or true.
    balance = [record["balance_loss"] for record in records[1:]]
    assert all(value > 0.03 for value in balance[:5]) and all(value < 0.001 for value in balance[5:])
    assert records[-1]["validation_loss"] < records[0]["validation_loss"]


def test_a_broken_run_continues_bit_for_bit_with_the_same_command(started: Path, unbroken: Path) -> None:
    small = [*COMMON, "run.dir=runs/broken_ft", "checkpoint.resume=auto"]
    stop = ["finetune.epochs=null", "train.steps=4", f"schedule.total_steps={STEPS}"]
    run(fine_tuning(torchrun(2, *small, *stop)), started)
    run_dir = started / "runs" / "broken_ft"
    before = [{k: v for k, v in record.items() if not k.startswith("validation")} for record in metrics_of(unbroken)]
    there = [{k: v for k, v in record.items() if not k.startswith("validation")} for record in metrics_of(run_dir)]
    assert there == before[:5]
    run(fine_tuning(deepspeed(2, *small)), started)
    assert metrics_of(run_dir)[5:] == metrics_of(unbroken)[5:]


@pytest.fixture
def here(started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """The command in this process, which is to train nothing."""
    monkeypatch.chdir(started)

    def call(*arguments: str, command: Callable[..., int] = finetune) -> Finished:
        capsys.readouterr()
        code = command(list(arguments), REPOSITORY / "configs" / "finetune.yaml")
        return Finished(code, *capsys.readouterr())

    return call


def test_dry_run_and_print_config_know_the_length(started: Path, here: Callable[..., Finished]) -> None:
    assert f"in {STEPS} steps" in here(*COMMON, "--dry-run").stdout
    packed = here(*COMMON, "finetune.packing=true", "--dry-run").stdout
    assert " steps" in packed and f"in {STEPS} steps" not in packed
    printed = here(*COMMON, "--print-config").stdout
    assert yaml.safe_load(printed)["train"]["steps"] == STEPS
    (started / "printed.yaml").write_text(printed)
    assert here("--config", "printed.yaml", "--print-config").stdout == printed


def test_refusals(started: Path, here: Callable[..., Finished]) -> None:
    def refused(*arguments: str, **more: Any) -> str:
        done = here(*COMMON, *arguments, "--dry-run", **more)
        assert done.returncode == 2 and len(done.errors) == 1, done.stderr
        return done.errors[0]

    assert "checkpoint.load_weights is not set" in refused("checkpoint.load_weights=null")
    nothing = refused("checkpoint.load_weights=null", "checkpoint.resume=auto", "run.dir=runs/none")
    assert "finds nothing to continue in runs/none" in nothing
    message = refused("train.steps=7")
    assert "train.steps=7 and finetune.epochs=2 contradict each other" in message and f"{STEPS} steps" in message
    assert "train.jsonl:1" in refused("model.sequence_length=8", "finetune.too_long=refuse")
    assert "finetune.trainable names 'routr', which matches no weight" in refused("finetune.trainable=[routr]")
    assert "data.prepare.input=['x'] is for pre-training" in refused("data.prepare.input=[x]")
    topk = ["moe.router.type=topk", "moe.num_null_experts=0", "moe.router.balance.type=switch"]
    assert "moe.router.type=topk is Megatron's own router" in refused(*topk)
    assert "finetune.lora.targets names 'expert'; did you mean experts?" in refused("finetune.lora.targets=[expert]")
    assert "finetune.packing is set, and launch/pretrain.py does not read it" in refused(
        "finetune.epochs=null", "finetune.anneal_epochs=null", "finetune.packing=true", command=pretrain
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=[{path: trian.jsonl, weight: 1}]"], "data trian.jsonl: no such file"),
        (["data.validation=[{path: runs}]"], "data runs: a directory"),
        (["data.validation=[{path: held_out.jsonl}, {path: bad.jsonl}]"], "bad.jsonl:1 is not JSON"),
        (["train.steps=7"], "train.steps=7 and finetune.epochs=2 contradict each other"),
    ],
)
def test_a_refused_run_leaves_nothing(
    started: Path, here: Callable[..., Finished], arguments: list[str], message: str
) -> None:
    (started / "bad.jsonl").write_text("{\n")
    done = here(*COMMON, "run.dir=runs/refused", *arguments)
    assert done.returncode == 2 and len(done.errors) == 1 and message in done.errors[0], done.stderr
    assert not (started / "runs" / "refused").exists()


def test_another_model_is_refused(started: Path) -> None:
    done = run_command(fine_tuning(one_process(*COMMON, "moe.top_k=2", "run.dir=runs/other_k")), started)
    assert done.returncode == 2 and "moe.top_k is 3 there, 2 here" in done.errors[0]
