"""What ``monitor.profile`` may be."""

from typing import Any

import pytest

from adamoe_dist.config import config_from_dict, profile_steps_problem, resolve
from tests.config.test_validate import refusal, tree


def profiled(train: dict[str, Any] | None = None, **profile: Any):
    return tree(monitor={"profile": profile}, train={"steps": 40, **(train or {})})


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({"steps": [10]}, "monitor.profile.steps=[10] must be [FIRST, LAST] with 1 <= FIRST <= LAST, such as [10, 12]"),
        ({"steps": [10, 11, 12]}, "monitor.profile.steps=[10, 11, 12] must be [FIRST, LAST]"),
        ({"steps": [12, 10]}, "monitor.profile.steps=[12, 10] must be [FIRST, LAST]"),
        ({"steps": [0, 1]}, "monitor.profile.steps=[0, 1] must be [FIRST, LAST]"),
        ({"steps": [40, 41]}, "monitor.profile.steps=[40, 41] ends after the last step, train.steps=40"),
        ({"steps": [1, 2], "ranks": [0, 2]}, "monitor.profile.ranks=[0, 2] names rank 2, and the run has ranks 0 to 1"),
        ({"steps": [1, 2], "ranks": [-1]}, "monitor.profile.ranks=[-1] names rank -1"),
        ({"steps": [1, 2], "ranks": []}, "monitor.profile.ranks=[] must name at least one rank"),
        ({"steps": [1, 2], "ranks": [1, 1]}, "monitor.profile.ranks=[1, 1] must name at least one rank, each once"),
        ({"ranks": [1]}, "monitor.profile.ranks=[1], monitor.profile.memory=True do nothing without"),
        ({"memory": False}, "do nothing without monitor.profile.steps"),
    ],
)
def test_what_can_not_be_profiled_is_refused(profile: dict[str, Any], expected: str) -> None:
    assert expected in refusal(profiled(**profile), 2)


def test_good_choices() -> None:
    for profile in ({}, {"steps": [1, 1]}, {"steps": [38, 40], "ranks": [1, 0], "memory": False}):
        resolve(profiled(**profile), 2)


@pytest.mark.parametrize("steps", ["10-12", 10, [1.5, 2], [True, 2]])
def test_types(steps: Any) -> None:
    with pytest.raises(Exception, match=r"monitor.profile.steps=.* must be a list"):
        config_from_dict({"monitor": {"profile": {"steps": steps}}})


def test_the_length_of_a_run_that_epochs_set_is_checked_once_it_is_known() -> None:
    config = tree(
        monitor={"profile": {"steps": [150, 150]}}, finetune={"epochs": 2.0}, checkpoint={"load_weights": "model"}
    )
    resolve(config, 1)
    assert "train.steps=100" in str(profile_steps_problem(config))
    config.train.steps = 150
    assert profile_steps_problem(config) is None


def test_a_peak_is_a_positive_number() -> None:
    with pytest.raises(Exception, match=r"monitor.peak_tflops=0 must be greater than 0"):
        config_from_dict({"monitor": {"peak_tflops": 0}})
