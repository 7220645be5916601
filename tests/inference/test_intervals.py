"""Intervals against simulation, exact sums and values from the literature."""

import math

import numpy as np
import pytest

from adamoe_dist.inference.intervals import (
    accuracy_report,
    mcnemar_p,
    paired_accuracy_report,
    paired_bits_report,
    paired_interval,
    wilson_interval,
)


@pytest.mark.parametrize("items", [1, 7, 50])
def test_wilson_bounds_are_where_the_score_test_says(items: int) -> None:
    """The interval's ends are the shares p0 with |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    for right in range(items + 1):
        share = right / items
        for bound in wilson_interval(right, items):
            assert abs(share - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / items), abs=1e-7
            )


def test_the_standard_error_is_that_of_the_mean() -> None:
    correct = [True] * 7 + [False] * 13
    report = accuracy_report(correct)
    assert report["value"] == 0.35 and report["correct"] == 7 and report["items"] == 20
    assert report["standard_error"] == pytest.approx(np.std(correct, ddof=1) / math.sqrt(20))
    assert accuracy_report([True])["standard_error"] is None


def test_mcnemar_against_all_outcomes() -> None:
    for gained, lost in [(0, 0), (1, 0), (5, 0), (6, 2), (4, 4), (10, 3)]:
        total = gained + lost
        splits = [(a, math.comb(total, a) / 2**total) for a in range(total + 1)]
        expected = sum(p for a, p in splits if abs(2 * a - total) >= abs(gained - lost))
        assert mcnemar_p(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize("shares", [(0.4, 0.2, 0.2, 0.2), (0.5, 0.1, 0.05, 0.35), (0.2, 0.3, 0.1, 0.4)])
def test_a_paired_interval_holds_the_truth_as_often_as_it_says(shares: tuple[float, ...]) -> None:
    """Exactly, over all outcomes of 24 items."""
    items, covered = 24, 0.0
    for both in range(items + 1):
        for gained in range(items + 1 - both):
            for lost in range(items + 1 - both - gained):
                counts = (both, gained, lost, items - both - gained - lost)
                ways = math.factorial(items) / math.prod(math.factorial(count) for count in counts)
                chance = ways * math.prod(share**count for share, count in zip(shares, counts, strict=True))
                low, high = paired_interval(*counts)
                covered += chance * (low <= shares[1] - shares[2] <= high)
    assert 0.94 < covered < 0.975


def test_a_paired_difference_and_its_interval() -> None:
    generator = np.random.default_rng(1)
    here, there = generator.random(400) < 0.6, generator.random(400) < 0.5
    report = paired_accuracy_report(here.tolist(), there.tolist())
    gaps = here.astype(float) - there.astype(float)
    assert report["difference"] == pytest.approx(gaps.mean())
    low, high = report["interval_95"]
    error = gaps.std() / math.sqrt(400)
    assert low == pytest.approx(gaps.mean() - 1.96 * error, abs=0.005)
    assert high == pytest.approx(gaps.mean() + 1.96 * error, abs=0.005)
    same = paired_accuracy_report([True] * 2 + [False] * 3, [True] * 2 + [False] * 3)
    assert same["difference"] == 0 and same["mcnemar_p"] == 1
    assert same["interval_95"][0] == -same["interval_95"][1] < -0.1, "five items cannot say that two models are equal"


def test_bits_are_compared_over_documents() -> None:
    nats, other, sizes = [10.0, 30.0, 5.0], [12.0, 31.0, 9.0], [10, 20, 10]
    report = paired_bits_report(nats, other, sizes)
    assert report["difference"] == pytest.approx(-7 / 40 / math.log(2))
    low, high = report["interval_95"]
    assert low < report["difference"] < high < 0
    assert paired_bits_report([1.0], [2.0], [4])["interval_95"] is None
