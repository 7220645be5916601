"""Traces of chosen steps, and the times of a whole run."""

import json
from pathlib import Path
from typing import Any

import pytest

from adamoe_dist.training import pretrain
from tests.end_to_end.conftest import LAYER_PARTS, PHASES, run_command, torchrun

pytestmark = pytest.mark.end_to_end

STEP = "ProfilerStep#"
NAMES = (*PHASES[:-1], *LAYER_PARTS, "save")
MICRO_BATCHES, LAYERS = 2, 2


@pytest.fixture(scope="module")
def profiled(workspace: Path) -> Path:
    """Eight steps on two ranks, the third and fourth profiled; a save comes between them, a validation after them."""
    arguments = ["train.steps=8", "monitor.profile.steps=[3,4]", "monitor.profile.ranks=[0,1]", "checkpoint.interval=3"]
    more = ["train.validation_interval=4", "monitor.log_interval=2", "monitor.peak_tflops=0.05"]
    done = run_command(torchrun(2, "--config", "small.yaml", "run.dir=runs/profiled", *arguments, *more), workspace)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "profile of steps 3 to 4 in runs/profiled/profile/rank_0000_steps_3-4.pt.trace.json" in done.stdout
    assert "MFU: against 0.05 TFLOP/s a rank" in done.stdout
    return workspace / "runs" / "profiled"


def ranges_of(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of what this project names."""
    return [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") == "user_annotation" and (event["name"] in NAMES or event["name"].startswith(STEP))
    ]


def around(span: tuple[str, float, float], spans: list[tuple[str, float, float]]) -> set[str]:
    _, start, end = span
    return {name for name, first, last in spans if first <= start and end <= last and (first, last) != (start, end)}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_trace_has_the_chosen_steps_and_their_ranges(profiled: Path, rank: int) -> None:
    trace = json.loads((profiled / "profile" / f"rank_{rank:04d}_steps_3-4.pt.trace.json").read_text())
    assert trace["distributedInfo"]["rank"] == rank
    spans = ranges_of(trace)
    counts = {name: sum(span[0] == name for span in spans) for name in NAMES}
    forwards = 2 * MICRO_BATCHES
    assert {span[0] for span in spans if span[0].startswith(STEP)} == {f"{STEP}3", f"{STEP}4"}
    assert counts["forward"] == counts["backward"] == forwards
    assert counts["data"] == counts["optimizer"] == 2 and counts["save"] == 1 and counts["pipeline"] == 0
    assert counts["routing"] == counts["experts"] == forwards * LAYERS, "validation is not in the trace"
    assert counts["dispatch"] == counts["combine"] == 3 * forwards * LAYERS, (
        "planned or sent back, moved, sorted or summed"
    )
    for span in spans:
        outer = around(span, spans)
        if span[0] in LAYER_PARTS:
            assert "forward" in outer and not outer & set(LAYER_PARTS), span
        elif span[0] in PHASES:
            assert len(outer) == 1 and outer.pop().startswith(STEP), span
        else:
            assert not outer, f"{span} lies between steps or is one"
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    of_experts = [(event["ts"], event["ts"] + event["dur"]) for event in products]
    assert any("experts" in around(("", *times), spans) for times in of_experts)
    assert any(event.get("name") == "[memory]" for event in trace["traceEvents"])


def test_nothing_else_is_written(profiled: Path) -> None:
    assert sorted(path.name for path in (profiled / "profile").iterdir()) == [
        f"rank_000{rank}_steps_3-4.pt.trace.json" for rank in (0, 1)
    ]


def test_metrics_of_time_and_speed(profiled: Path) -> None:
    records = [json.loads(line) for line in (profiled / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4, 6, 8]
    for record in records[1:]:
        for part in (*PHASES, *LAYER_PARTS, "save"):
            assert (f"time_{part}_s" in record) == (part != "pipeline")
        assert sum(record[f"time_{part}_s"] for part in LAYER_PARTS) < record["time_forward_s"], "without validation"
        assert record["mfu"] == pytest.approx(record["model_flops_per_second"] / (2 * 0.05e12))
        assert record["model_flops_per_second"] > 2e5 * record["tokens_per_second"]
    saved = {record["step"]: record["time_save_s"] for record in records[1:]}
    assert saved[2] == saved[6] == 0 < min(saved[4], saved[8]), "after steps 3 and 6"


def test_tensorboard_has_them(profiled: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(profiled / "tensorboard"))
    events.Reload()
    last = json.loads((profiled / "metrics.jsonl").read_text().splitlines()[-1])
    for tag, value in (
        ("time/forward_s", last["time_forward_s"]),
        ("time/routing_s", last["time_routing_s"]),
        ("speed/mfu", last["mfu"]),
        ("speed/model_tflops_per_second", last["model_flops_per_second"] / 1e12),
    ):
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("monitor.profile.steps=[40,41]", "monitor.profile.steps=[40, 41] ends after the last step, train.steps=40"),
        ("monitor.profile.steps=10-12", "monitor.profile.steps='10-12' must be a list"),
        ("monitor.peak_tflops=-1", "monitor.peak_tflops=-1 must be greater than 0"),
    ],
)
def test_mistakes_are_refused_in_one_line(workspace, monkeypatch, capfd, override: str, expected: str) -> None:
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pretrain(["--config", "small.yaml", override]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {expected}"), lines
