"""When the profiler starts, ends and gives up."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adamoe_dist.config import ProfileConfig, config_from_dict
from adamoe_dist.errors import UserError
from adamoe_dist.timing import Ranges
from adamoe_dist.training.callback import StepResult, TokenCounts
from adamoe_dist.training.profiling import StepProfiler
from adamoe_dist.training.task import FineTuning


def run(profiler: StepProfiler, steps: range, stop_after: int = 100, rank: int = 0) -> Any:
    """What the loop does with a callback, from the step after ``steps.start``."""
    trainer = SimpleNamespace(step=steps.start, rank=rank, ranges=Ranges(), is_last_step=False)
    profiler.on_start(trainer)  # type: ignore[arg-type]
    for step in steps:
        profiler.before_step(trainer)  # type: ignore[arg-type]
        with trainer.ranges("forward"):
            torch.ones(2) + step
        trainer.step = step + 1
        trainer.is_last_step = step + 1 == stop_after
        profiler.after_step(trainer, StepResult(step + 1, 0.0, 0.0, 0.0, 0.0, 0, TokenCounts(0, 0)))  # type: ignore[arg-type]
        if trainer.is_last_step:
            break
    return trainer


def names_in(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_the_chosen_steps(tmp_path: Path) -> None:
    trainer = run(StepProfiler(ProfileConfig(steps=[2, 3]), tmp_path / "profile"), range(6))
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank_0000_steps_2-3.pt.trace.json"
    assert names_in(trace) == ["ProfilerStep#2", "forward", "ProfilerStep#3", "forward"]
    assert "[memory]" in trace.read_text()
    trainer.ranges.add(listener := SimpleNamespace())
    assert trainer.ranges._listeners == (listener,), "the profiler listens no more"


def test_without_allocations(tmp_path: Path) -> None:
    run(StepProfiler(ProfileConfig(steps=[2, 2], memory=False), tmp_path), range(3))
    assert "[memory]" not in (tmp_path / "rank_0000_steps_2-2.pt.trace.json").read_text()


def test_a_run_that_begins_within_or_ends_early_names_what_it_has(tmp_path: Path) -> None:
    run(StepProfiler(ProfileConfig(steps=[2, 8]), tmp_path), range(4, 20), stop_after=6)
    assert names_in(tmp_path / "rank_0000_steps_5-6.pt.trace.json") == [
        "ProfilerStep#5",
        "forward",
        "ProfilerStep#6",
        "forward",
    ]


def test_too_late_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(StepProfiler(ProfileConfig(steps=[2, 3]), tmp_path / "profile"), range(3, 5))
    assert "monitor.profile.steps=[2, 3] are done: the run continues after step 3" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run(StepProfiler(ProfileConfig(steps=[2, 3], ranks=[1]), tmp_path / "profile"), range(5))
    assert not (tmp_path / "profile").exists()


def test_a_disk_that_refuses_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    run(StepProfiler(ProfileConfig(steps=[1, 1]), tmp_path / "profile"), range(3))
    assert "rank_0000_steps_1-1.pt.trace.json is not written" in caplog.text


def test_a_trace_that_was_cut_off_is_not_kept(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(self: Any, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    run(StepProfiler(ProfileConfig(steps=[1, 1]), tmp_path), range(3))
    assert "was cut off" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_failing_run_leaves_none(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=[1, 9]), tmp_path / "profile")
    run(profiler, range(3))
    profiler.close()
    profiler.close()
    assert not (tmp_path / "profile").exists()


def test_on_cuda_a_snapshot_of_memory_is_written_too(tmp_path: Path, monkeypatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", max_entries=0: calls.append((enabled, max_entries > 0)),
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    monkeypatch.setattr("adamoe_dist.platform.profiled_activities", lambda: [torch.profiler.ProfilerActivity.CPU])
    run(StepProfiler(ProfileConfig(steps=[1, 2]), tmp_path), range(3))
    assert calls == [("all", True), "rank_0000_steps_1-2.memory.pickle", (None, False)]
    calls.clear()
    profiler = StepProfiler(ProfileConfig(steps=[1, 9]), tmp_path)
    run(profiler, range(1))
    profiler.close()
    assert calls == [("all", True), (None, False)], "dropped"


def test_steps_that_the_epochs_of_a_fine_tuning_run_do_not_reach_are_refused() -> None:
    profile = {"steps": [21, 21]}
    config = config_from_dict(
        {
            "monitor": {"profile": profile},
            "finetune": {"epochs": 2.0},
            "train": {"global_batch_size": 8},
            "checkpoint": {"load_weights": "model"},
        }
    )
    with pytest.raises(UserError, match=r"monitor.profile.steps=\[21, 21\] ends after the last step, train.steps=20"):
        FineTuning()._set_steps(config, samples=80)
    FineTuning()._set_steps(config, samples=84)
    assert config.train.steps == 21
