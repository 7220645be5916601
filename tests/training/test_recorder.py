"""What the recorder measures and when it validates."""

import signal
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adamoe_dist.config import config_from_dict
from adamoe_dist.routing import SUMS
from adamoe_dist.timing import Ranges
from adamoe_dist.training import metrics, recorder
from adamoe_dist.training.callback import StepResult, TokenCounts
from adamoe_dist.training.recorder import Recorder
from adamoe_dist.training.validation import Validation

STEPS = 8


def result(step: int, seconds: float = 1.0, tokens: int = 8) -> StepResult:
    return StepResult(step, 2.0, 1.0, 0.1, seconds, 0, TokenCounts(tokens, tokens))


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loop without a model: its counters are 0, and a validation is only counted."""
    config = config_from_dict(
        {
            "run": {"dir": str(tmp_path)},
            "train": {"steps": STEPS, "validation_interval": 3},
            "monitor": {"log_interval": 3, "tensorboard": False},
        }
    )
    layers, experts = len(config.moe_layers), config.moe.num_experts
    empty = torch.zeros(layers, len(SUMS) + 4 + config.moe.top_k + 1 + experts, dtype=torch.float64)
    monkeypatch.setattr(metrics, "layer_vectors", lambda trainer: empty)
    monkeypatch.setattr(metrics, "peak_memory_gib", lambda device: 0.0)
    monkeypatch.setattr(recorder, "phase_fields", lambda *_: {})
    validated: list[int] = []

    def validate(trainer: Any, sets: Any) -> Validation:
        validated.append(trainer.step)
        return Validation(1.0, 1.0, 1.0)

    monkeypatch.setattr(recorder, "validate", validate)
    return SimpleNamespace(
        config=config,
        step=0,
        rank=0,
        tokens_seen=0,
        stop_signal=None,
        failure=None,
        is_last_step=False,
        device=torch.device("cpu"),
        seconds=defaultdict(float),
        events={},
        ranges=Ranges(),
        engine=SimpleNamespace(is_scaled=False),
        resolved=SimpleNamespace(layout=SimpleNamespace(tensor=1), tokens_per_step=8),
        validated=validated,
    )


def run(trainer: Any, results: list[StepResult], stop_after: int = STEPS) -> Recorder:
    """What the loop does with a recorder."""
    speed = SimpleNamespace(fields=lambda tokens_per_second, load: {"model_flops_per_second": 2 * tokens_per_second})
    recorder = Recorder([SimpleNamespace()], speed)  # type: ignore[arg-type, list-item]
    recorder.on_start(trainer)
    for one in results:
        recorder.before_step(trainer)
        trainer.step = one.step
        trainer.stop_signal = signal.SIGTERM if one.step == stop_after else None
        trainer.is_last_step = one.step in (STEPS, stop_after)
        recorder.after_step(trainer, one)
        if trainer.is_last_step:
            break
    recorder.on_finish(trainer)
    recorder.close()
    return recorder


def test_speed_is_all_tokens_over_all_seconds_since_the_last_record(trainer: Any) -> None:
    recorder = run(trainer, [result(1, 9.0, 900), result(2, 1.0, 10), result(3, 3.0, 90)], stop_after=3)
    record = recorder.last_record
    assert record["tokens_per_second"] == pytest.approx(100 / 4), "without the first step"
    assert record["step_time_s"] == pytest.approx(2.0)
    assert record["model_flops_per_second"] == pytest.approx(50)


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_run_that_a_signal_ends_is_not_validated_any_more(trainer: Any, stop_after: int) -> None:
    recorder = run(trainer, [result(step) for step in range(1, STEPS + 1)], stop_after)
    assert trainer.validated == [step for step in (0, 3, 6) if step < stop_after]
    assert recorder.last_record["step"] == stop_after and "validation_loss" not in recorder.last_record


def test_a_resumed_run_that_a_signal_ends_at_once_is_not_validated_either(trainer: Any) -> None:
    trainer.step = 4
    run(trainer, [result(5)], stop_after=5)
    assert trainer.validated == []


def test_a_run_that_ends_by_itself_is_validated_at_intervals_and_at_the_end(trainer: Any) -> None:
    run(trainer, [result(step) for step in range(1, STEPS + 1)], stop_after=STEPS + 1)
    assert trainer.validated == [0, 3, 6, 8]
