"""What single experts do: how much each has, which tokens it prefers, which experts go together.

Axes: T tokens, E true experts, C classes.
"""

from dataclasses import dataclass

import numpy as np

from adamoe_dist.inspection.classes import Grouping
from adamoe_dist.inspection.record import Array, LayerRoutes, Routing
from adamoe_dist.inspection.statistics import MINIMUM_COUNT

MINIMUM_EXPECTED = 5.0
"""Pairs that independence would give, below which nothing is said of a pair of experts."""


@dataclass(frozen=True)
class Preference:
    """An expert that has a class of tokens more often than the text.

    Attributes:
        layer: the layer's number.
        expert: the expert's number.
        label: the class.
        lift: part of the class among the expert's tokens over its part in the text.
        count: the expert's tokens of that class.
        tokens: all tokens of the expert.
    """

    layer: int
    expert: int
    label: str
    lift: float
    count: int
    tokens: int


def relative_loads_LE(routing: Routing) -> Array:
    """Return each expert's tokens over the mean of its layer's experts: 1 is an even share."""
    counts_LE = np.stack([layer.selected_TE.sum(axis=0) for layer in routing.layers]).astype(np.float64)
    relative_LE: Array = counts_LE / np.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-12)
    return relative_LE


def lift_EC(layer: LayerRoutes, grouping: Grouping) -> Array:
    """Return P(class | expert) / P(class) over the tokens that have a class; NaN where too few tokens speak.

    An expert with fewer than 30 tokens says nothing, nor does a class that is expected fewer than 5 times among them,
    unless it is there 30 times.
    """
    classed_T = grouping.classes_T >= 0
    onehot_TC = grouping.classes_T[classed_T, None] == np.arange(len(grouping.labels))[None, :]
    counts_EC = layer.selected_TE[classed_T].T.astype(np.float64) @ onehot_TC.astype(np.float64)
    tokens_E = counts_EC.sum(axis=1, keepdims=True)
    expected_EC = tokens_E * onehot_TC.mean(axis=0)[None, :]
    is_common_EC = (expected_EC >= MINIMUM_EXPECTED) | (counts_EC >= MINIMUM_COUNT)
    enough_EC = is_common_EC & (tokens_E >= MINIMUM_COUNT)
    lift: Array = np.where(enough_EC, counts_EC / np.maximum(expected_EC, 1e-12), np.nan)
    return lift


def preferences(routing: Routing, groupings: list[Grouping]) -> list[Preference]:
    """Return all lifts above 1 that enough tokens support, the highest first."""
    found = []
    for layer in routing.layers:
        for grouping in groupings:
            lifts_EC = lift_EC(layer, grouping)
            for expert, index in zip(*np.nonzero(np.nan_to_num(lifts_EC) > 1.0), strict=True):
                of_expert_T = layer.selected_TE[:, expert]
                count = int((of_expert_T & (grouping.classes_T == index)).sum())
                lift = float(lifts_EC[expert, index])
                label = grouping.labels[index]
                if count >= MINIMUM_COUNT:
                    found.append(Preference(layer.number, int(expert), label, lift, count, int(of_expert_T.sum())))
    return sorted(found, key=lambda one: (-one.lift, one.layer, one.expert, one.label))


def coactivation_EE(layer: LayerRoutes) -> Array:
    """Return how often each pair of experts has the same token, over what independence would give.

    1: as often as two experts that choose for themselves. NaN where fewer than 5 pairs are expected, and an expert with
    itself.
    """
    selected_TE = layer.selected_TE.astype(np.float64)
    pairs_EE = selected_TE.T @ selected_TE
    counts_E = selected_TE.sum(axis=0)
    expected_EE = np.outer(counts_E, counts_E) / max(selected_TE.shape[0], 1)
    ratio_EE: Array = np.where(expected_EE >= MINIMUM_EXPECTED, pairs_EE / np.maximum(expected_EE, 1e-12), np.nan)
    np.fill_diagonal(ratio_EE, np.nan)
    return ratio_EE
