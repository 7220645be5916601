"""Histograms hold exact counts, as TensorBoard reads them; heat maps are of the right numbers."""

import numpy as np
import pytest
from tensorboard.data_compat import migrate_value
from tensorboard.util import tensor_util

from adamoe_dist.monitoring import RoutingCounts
from adamoe_dist.monitoring.pictures import heat_maps, histograms

COUNTS = RoutingCounts(
    layers=[1, 3, 11],
    tokens_by_load_LC=np.array([[0, 5, 7, 0], [2**40, 1, 0, 3], [0, 0, 0, 0]]),
    tokens_by_expert_LE=np.array([[19, 0], [6, 4], [0, 0]]),
)


def buckets(value) -> dict[float, float]:
    """What TensorBoard shows: the middle of each bucket, all one wide, and its count."""
    found = tensor_util.make_ndarray(migrate_value(value).tensor)
    assert all(right - left == 1 for left, right, _ in found)
    return {(left + right) / 2: count for left, right, count in found}


def test_histograms_are_the_counts() -> None:
    values = {value.tag: value for value in histograms(COUNTS)}
    assert list(values) == [
        "routing/true_experts_of_tokens",
        "layers/true_experts_of_tokens/01",
        "layers/true_experts_of_tokens/03",
    ], "a layer that saw no token has none"
    assert buckets(values["layers/true_experts_of_tokens/01"]) == {1: 5, 2: 7}
    assert list(values["layers/true_experts_of_tokens/01"].histo.bucket) == [5, 7], "the ends are not empty"
    assert buckets(values["layers/true_experts_of_tokens/03"]) == {0: 2**40, 1: 1, 2: 0, 3: 3}
    overall = values["routing/true_experts_of_tokens"].histo
    assert list(overall.bucket) == [2**40, 6, 7, 3]
    assert (overall.num, overall.sum, overall.sum_squares) == (2**40 + 16, 6 + 14 + 9, 6 + 28 + 27)


def test_heat_maps_are_of_shares() -> None:
    np.testing.assert_array_equal(COUNTS.relative_LE, [[2, 0], [1.2, 0.8], [np.nan, np.nan]])
    np.testing.assert_allclose(COUNTS.shares_LC[0], [0, 5 / 12, 7 / 12, 0])
    assert np.isnan(COUNTS.shares_LC[2]).all()
    load, numbers = heat_maps(COUNTS)
    assert (load.tag, numbers.tag) == ("heat_map/expert_load", "heat_map/true_experts")
    assert load.image.encoded_image_string.startswith(b"\x89PNG") and load.image.width > 300


@pytest.mark.filterwarnings("error")
def test_a_step_in_which_nothing_was_routed_draws_nothing_and_does_not_warn() -> None:
    empty = RoutingCounts([0], np.zeros((1, 3), dtype=int), np.zeros((1, 4), dtype=int))
    assert histograms(empty) == [] and len(heat_maps(empty)) == 2
