"""Time left and the line of a step."""

from types import SimpleNamespace

import pytest

from adamoe_dist.training.display import Pace, duration, progress_line, quantity


def test_time_left_leaves_out_the_first_step_and_counts_what_is_between_steps() -> None:
    pace = Pace()
    assert pace.left_s(3) is None and pace.left_s(0) == 0.0
    pace.note(90.0, now=90.0)  # compiles
    assert pace.left_s(10, now=90.0) is None
    pace.note(2.0, now=92.0)
    assert pace.left_s(10, now=92.0) == pytest.approx(20.0)
    pace.note(2.0, now=94.0)
    assert pace.left_s(10, now=100.0) == pytest.approx(10 * (2.0 + 3.0)), "6 s of validation after two steps"


def test_time_left_follows_a_change_of_speed() -> None:
    pace, now = Pace(), 0.0
    for seconds in [5.0] * 101 + [1.0] * 50:
        now += seconds
        pace.note(seconds, now=now)
    assert pace.left_s(10, now=now) == pytest.approx(10.0)


def record(**changes: float) -> dict[str, float]:
    fields = {
        "step": 123456,
        "lm_loss": 2.34567,
        "balance_loss": 0.0312,
        "grad_norm": 0.8971,
        "true_experts_per_token": 1.62,
        "null_share": 0.459,
        "all_null_share": 0.027,
        "learning_rate": 3e-4,
        "tokens_per_second": 1_234_567.0,
        "step_time_s": 12.3456,
        "dispatch_rows": 123_456_789,
        "dispatch_rows_undeduplicated": 145_000_000,
    }
    return {**fields, **changes}


def test_line_gives_way_to_narrow_terminals() -> None:
    trainer = SimpleNamespace(step=123456, config=SimpleNamespace(train=SimpleNamespace(steps=500_000)))
    pace = Pace()
    pace.note(30.0, now=0.0)
    pace.note(1.0, now=1.0)
    line = progress_line(trainer, record(), pace)
    left = duration(pace.left_s(500_000 - 123_456))
    pace_now = str(line).rpartition("| left ")[2]
    assert pace_now.count(":") == 2 and len(left) >= 7
    assert str(line).startswith("step 123456/500000 | loss 2.3457 | load 1.62 (null 46%, all-null 3%) | 1.23M tok/s | ")
    assert line.fitted(500) == str(line)
    for width in (80, 100, 120, 140, 160):
        fitted = line.fitted(width)
        assert len(fitted) <= width, fitted
        for kept in ("step 123456/500000", "loss 2.3457", "load 1.62", "1.23M tok/s", "left "):
            assert kept in fitted
    assert "rows" in line.fitted(180) and "rows" not in line.fitted(120) and "norm" in line.fitted(100)


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (950, "950"), (4145, "4.14k"), (999_600, "1M"), (1_234_567, "1.23M"), (2e9, "2G"), (5e17, "500P")],
)
def test_quantities(number: float, words: str) -> None:
    assert quantity(number) == words
