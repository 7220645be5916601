"""tools/plan.py's command line, in this process: what is asked decides what is printed and what is refused."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adamoe_dist.errors import UserError
from tests.distributed.cases import BASE, merged

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plan.py"
Call = Callable[..., str]
STEP = '{"true_experts_per_token": 1.5, "all_null_share": 0.1}\n'


@pytest.fixture(scope="module")
def tool() -> Callable[[list[str]], None]:
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture
def call(tool, tmp_path: Path, capsys, monkeypatch) -> Call:
    monkeypatch.chdir(tmp_path)
    tree = merged(BASE, {"train": {"global_batch_size": 16}})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))

    def called(*arguments: str) -> str:
        tool(["--config", "small.yaml", "--nodes", "1", "--gpus-per-node", "2", "--vocab-size", "128", *arguments])
        return capsys.readouterr().out

    return called


def refusal(call: Call, *arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_sweep_does_not_plan_the_configured_layout(call: Call) -> None:
    """Which three ranks refuse."""
    assert "train.global_batch_size=16" in refusal(call, "--gpus-per-node", "3")
    printed = call("--gpus-per-node", "3", "--sweep")
    assert "| 9999 " in printed and "bottleneck:" not in printed and "matmul_efficiency=0.55" in printed
    answer = json.loads(call("--gpus-per-node", "3", "--sweep", "--json"))
    assert list(answer) == ["sweep"] and answer["sweep"]
    assert "a sweep has no plan to write" in refusal(call, "--sweep", "--write-config", "x.yaml")


def test_memory_of_every_stage(call: Call) -> None:
    answer = json.loads(call("--json", "zero.stage=2"))
    stages = answer["memory_by_stage"]
    assert list(stages) == ["0", "1", "2", "3"] and stages["2"]["weights"] == answer["memory_bytes"]["weights"]
    for stage, parts in stages.items():
        alone = json.loads(call("--json", f"zero.stage={stage}"))
        assert parts["sum"] == pytest.approx(alone["memory_gib"] * 2**30)
        assert sum(size for part, size in parts.items() if part != "sum") == pytest.approx(parts["sum"])
    printed = call("zero.stage=2")
    assert "| ZeRO-2 (this plan) " in printed and "| ZeRO-3 (experimental) " in printed and "| ZeRO-0 " in printed
    assert "ZeRO-0 is refused: " in call("zero.stage=2", "zero.offload_optimizer=true")


def test_overrides_after_assumptions_and_names_in_any_case(call: Call) -> None:
    answer = json.loads(call("--gpu", "H100", "--json", "--assume", "overlap=0.25", "parallel.expert=1"))
    assert answer["assumptions"]["overlap"] == 0.25 and answer["layout"]["expert"] == 1
    held = json.loads(call("--json", "--search", "--assume", "overlap=0.25", "parallel.expert=1", "--top", "3"))
    assert held["search_held"] == ["parallel.expert"] and {p["layout"]["expert"] for p in held["search"]} == {1}
    assert "cluster: 1 node x 2 h100" in call() and "-0.0%" not in call("parallel.expert=1")


def test_help_shows_no_empty_default(call: Call, capsys) -> None:
    with pytest.raises(SystemExit):
        call("--help")
    printed = capsys.readouterr().out
    assert "[]" not in printed and "(default: 10)" in printed


@pytest.mark.parametrize("end", ["", "\n", '{"true_exp', "\n\n"])
def test_a_run_that_goes_on_is_measured(call: Call, tmp_path: Path, end: str) -> None:
    gap = '{"step": 1, "validation_loss": 2.0}\n\n{"true_experts_per_token": null, "all_null_share": null}\n'
    (tmp_path / "metrics.jsonl").write_text(gap + STEP + STEP.replace("1.5", "1.25") + end)
    assert json.loads(call("--json", "--measured", "metrics.jsonl"))["true_experts_per_token"] == 1.25


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("5\n", "line 1 is no record"),
        ("x\n" + STEP, "line 1 is no JSON"),
        ('{"true_experts_per_token": 1.5}\n', "holds no step with true_experts_per_token and all_null_share"),
        (STEP.replace("0.1", "null"), "holds no step"),
        (STEP.replace("0.1", '"a"'), "holds no step"),
        ("", "holds no step"),
    ],
)
def test_no_metrics_are_refused(call: Call, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert f"--measured metrics.jsonl: {why}" in refusal(call, "--measured", "metrics.jsonl")


def test_files_are_refused_before_anything_is_planned_or_written(call: Call, tmp_path: Path) -> None:
    (tmp_path / "job").write_text("as it was")
    both: list[Any] = ["--write-config", "planned.yaml", "--write-slurm"]
    assert "--write-slurm job exists already" in refusal(call, *both, "job", "--memory-GiB", "0.01")
    assert "--write-slurm planned.yaml" in refusal(call, *both, "planned.yaml", "--overwrite", "--search")
    assert not (tmp_path / "planned.yaml").exists() and (tmp_path / "job").read_text() == "as it was"
    call(*both, "job", "--overwrite")
    assert str(tmp_path / "planned.yaml") in (tmp_path / "job").read_text()
