"""How sure a mean is: intervals of one accuracy, and of the difference of two on the same items."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000


def accuracy_report(correct: Sequence[bool]) -> dict[str, Any]:
    """Return an accuracy with its standard error and its 95 % interval.

    The standard error is that of a mean, sqrt(p (1 - p) / (n - 1)); the interval is Wilson's, which also holds for few
    items and near 0 and 1.
    """
    items, right = len(correct), sum(map(bool, correct))
    value = right / items
    return {
        "value": value,
        "correct": right,
        "items": items,
        "standard_error": math.sqrt(value * (1.0 - value) / (items - 1)) if items > 1 else None,
        "interval_95": list(wilson_interval(right, items)),
    }


def wilson_interval(right: int, items: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share ``right / items``."""
    share, squared = right / items, Z_95**2
    centre = (share + squared / (2 * items)) / (1 + squared / items)
    half = Z_95 / (1 + squared / items) * math.sqrt(share * (1 - share) / items + squared / (4 * items**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_accuracy_report(correct: Sequence[bool], baseline: Sequence[bool]) -> dict[str, Any]:
    """Return how two models' accuracies on the same items differ.

    ``difference`` is the first minus the second, with Newcombe's 95 % interval for pairs; ``mcnemar_p`` is the exact
    two-sided probability of a split of the items that only one of them has right at least as uneven as this one, were
    both equally good.
    """
    pairs = list(zip(correct, baseline, strict=True))
    both, gained = sum(a and b for a, b in pairs), sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    return {
        "difference": (gained - lost) / len(pairs),
        "interval_95": list(paired_interval(both, gained, lost, len(pairs) - both - gained - lost)),
        "only_here_right": gained,
        "only_baseline_right": lost,
        "mcnemar_p": mcnemar_p(gained, lost),
    }


def paired_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of two shares of the same items.

    It joins the Wilson intervals of the two by their correlation, and does not shrink to a point where all items agree
    (Newcombe, Statistics in Medicine 17, 2635 (1998), method 10).

    Args:
        both: items that both models have right.
        gained: items that only the first has right.
        lost: items that only the second has right.
        neither: items that none has right.
    """
    items = both + gained + lost + neither
    here, there = (both + gained) / items, (both + lost) / items
    here_low, here_high = wilson_interval(both + gained, items)
    there_low, there_high = wilson_interval(both + lost, items)
    spread = math.sqrt((both + gained) * (lost + neither) * (both + lost) * (gained + neither))
    agreement = float(both * neither - gained * lost)
    if agreement > 0:
        agreement = max(agreement - items / 2, 0.0)
    correlation = agreement / spread if spread else 0.0

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    difference = here - there
    return (
        difference - joined(here - here_low, there_high - there),
        difference + joined(here_high - here, there - there_low),
    )


def mcnemar_p(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test."""
    total, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_bits_report(
    nats: Sequence[float], baseline: Sequence[float], text_bytes: Sequence[int]
) -> dict[str, Any]:  # fmt: skip
    """Return how two models' bits per byte on the same documents differ.

    ``difference`` is the first minus the second (negative: the first is better); its interval is a bootstrap over
    documents (10,000 resamples, seed 0), None for a single document.
    """
    gaps, sizes = (np.asarray(nats) - np.asarray(baseline)) / math.log(2), np.asarray(text_bytes, dtype=np.float64)
    report: dict[str, Any] = {"difference": float(gaps.sum() / sizes.sum()), "interval_95": None}
    if len(gaps) > 1:
        generator = np.random.default_rng(0)
        shares = np.full(len(gaps), 1 / len(gaps))
        resampled = []
        for _ in range(RESAMPLES):
            times = generator.multinomial(len(gaps), shares)
            resampled.append(times @ gaps / (times @ sizes))
        report["interval_95"] = _percentiles(np.array(resampled))
    return report


def _percentiles(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
