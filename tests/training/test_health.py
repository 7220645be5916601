"""Loss spikes on synthetic curves, and the heartbeat file."""

import json
import math
import random
import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest

from adamoe_dist.parallel import TRAINING, Progress
from adamoe_dist.training import heartbeat
from adamoe_dist.training.callback import StepResult, TokenCounts
from adamoe_dist.training.heartbeat import Heartbeat
from adamoe_dist.training.spikes import FEWEST_LOSSES, SpikeDetector
from tests.disk import small_files


def noise(steps: int, seed: int = 1) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(0.0, 0.05) for _ in range(steps)]


def falling(steps: int) -> list[float]:
    return [2.0 + 8.0 * math.exp(-step / 100) + n for step, n in enumerate(noise(steps))]


def reported(losses: list[float], window: int = 100, factor: float = 6.0) -> list[int]:
    detector = SpikeDetector(window, factor)
    return [step for step, loss in enumerate(losses) if detector.add(loss) is not None]


def test_curves_without_a_spike() -> None:
    assert reported(falling(2000)) == []
    assert reported([3.0 + n for n in noise(2000)]) == []
    assert reported([2.5] * 50 + [2.5 + 1e-7] * 50) == [], "rounding"


@pytest.mark.parametrize("at", [FEWEST_LOSSES, 150, 1500])
def test_one_spike_is_reported_once_with_what_it_is_compared_with(at: int) -> None:
    losses = falling(2000)
    losses[at] += 30.0
    assert reported(losses) == [at]
    detector = SpikeDetector(100, 6.0)
    (spike,) = [found for found in map(detector.add, losses) if found]
    before = losses[max(0, at - 100) : at]
    assert spike.loss == losses[at]
    assert spike.mean == pytest.approx(statistics.fmean(before))
    assert spike.deviation == pytest.approx(statistics.pstdev(before))


def test_two_spikes_are_two() -> None:
    losses = [3.0 + n for n in noise(600)]
    losses[200] += 5.0
    losses[400] += 5.0
    assert reported(losses) == [200, 400]


def test_a_new_level_is_reported_once() -> None:
    assert reported([3.0 + n + (step >= 300) for step, n in enumerate(noise(1000))]) == [300]


def test_too_few_losses_tell_nothing_and_those_that_are_not_finite_are_no_losses() -> None:
    assert reported([3.0 + n for n in noise(FEWEST_LOSSES - 1)] + [99.0]) == []
    losses = [3.0 + n for n in noise(100)]
    losses[50] = math.nan
    losses[51] = math.inf
    losses[80] = 9.0
    assert reported(losses) == [80]


def test_the_factor_is_the_number_of_deviations() -> None:
    before = [1.0, 3.0] * 50  # mean 2, deviation 1
    assert reported([*before, 6.99], factor=5.0) == []
    assert reported([*before, 7.01], factor=5.0) == [100]


def test_heartbeat_follows_the_run_and_says_how_it_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.05)
    path, progress, trainer = tmp_path / "heartbeat.json", Progress(), SimpleNamespace()

    def read() -> dict[str, Any]:
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    beat = Heartbeat(path, progress, 100)
    assert read()["phase"] == "starting" and read()["lm_loss"] is None
    progress.enter(TRAINING)
    progress.step = 7
    beat.after_step(trainer, StepResult(7, math.nan, math.inf, 0.1, 0.25, 0, TokenCounts(0, 0)))  # type: ignore[arg-type]
    deadline = time.monotonic() + 20
    while read()["step"] != 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    now = read()
    assert (now["step"], now["steps"], now["phase"], now["lm_loss"], now["step_time_s"]) == (
        7,
        100,
        TRAINING,
        None,
        0.25,
    )
    assert now["epoch"] == pytest.approx(time.time(), abs=30) and {"time", "pid", "host"} <= set(now)
    time.sleep(0.3)
    assert read() == now, "no progress, no heartbeat"
    progress.end(3)
    progress.end(0)
    assert (read()["phase"], read()["exit_code"]) == ("stopped", 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["heartbeat.json"]


def test_heartbeat_of_a_run_that_finished(tmp_path) -> None:
    progress = Progress()
    Heartbeat(tmp_path / "heartbeat.json", progress, 1)
    progress.end(0)
    content = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (content["phase"], content["exit_code"]) == ("finished", 0)


def test_heartbeat_on_a_full_disk_is_a_warning_and_leaves_nothing(tmp_path, caplog) -> None:
    progress = Progress()
    with small_files(4):
        Heartbeat(tmp_path / "heartbeat.json", progress, 1)
    assert "heartbeat.json is not written" in caplog.text and not list(tmp_path.iterdir())
    progress.end(0)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["exit_code"] == 0
