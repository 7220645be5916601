"""What TensorBoard is shown of the counts of a step: heat maps and histograms.

Axes: L MoE layers, E true experts, C = top_k + 1 numbers of true experts, from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

from adamoe_dist.monitoring.heat_map import HeatMap

Array = NDArray[Any]
EXPERT_LOAD, TRUE_EXPERTS = "heat_map/expert_load", "heat_map/true_experts"
TRUE_EXPERTS_OF_TOKENS = "routing/true_experts_of_tokens"
TRUE_EXPERTS_OF_LAYER = "layers/true_experts_of_tokens"
DARKEST_LOAD = 3.0


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """The routing of one step, counted over all ranks; padding is not.

    Attributes:
        layers: the number of each MoE layer, from 0.
        tokens_by_load_LC: tokens that chose 0, 1, ..., top_k true experts.
        tokens_by_expert_LE: tokens that chose each true expert.
    """

    layers: Sequence[int]
    tokens_by_load_LC: Array
    tokens_by_expert_LE: Array

    @cached_property
    def relative_LE(self) -> Array:
        """Tokens of each expert over the layer's mean: 1 is an even share; NaN where a layer chose no true expert."""
        tokens_LE = self.tokens_by_expert_LE.astype(float)
        mean_L1 = tokens_LE.mean(axis=1, keepdims=True)
        return np.divide(tokens_LE, mean_L1, out=np.full_like(tokens_LE, np.nan), where=mean_L1 > 0)

    @cached_property
    def shares_LC(self) -> Array:
        """The part of each layer's tokens that chose each number of true experts; NaN without tokens."""
        tokens_LC = self.tokens_by_load_LC.astype(float)
        total_L1 = tokens_LC.sum(axis=1, keepdims=True)
        return np.divide(tokens_LC, total_L1, out=np.full_like(tokens_LC, np.nan), where=total_L1 > 0)


def heat_maps(counts: RoutingCounts) -> list[Summary.Value]:
    """Return the two heat maps of a step."""
    layers = [str(layer) for layer in counts.layers]
    load = HeatMap(
        title="Tokens of each expert, 1 is an even share",
        rows=layers,
        columns=[str(expert) for expert in range(counts.tokens_by_expert_LE.shape[1])],
        row_axis="layer",
        column_axis="true expert",
        highest=DARKEST_LOAD,
        form=".2f",
    )
    numbers = HeatMap(
        title="Part of the tokens with so many true experts",
        rows=layers,
        columns=[str(number) for number in range(counts.tokens_by_load_LC.shape[1])],
        row_axis="layer",
        column_axis="true experts of a token",
        highest=1.0,
        form=".0%",
    )
    return [_image(EXPERT_LOAD, load, counts.relative_LE), _image(TRUE_EXPERTS, numbers, counts.shares_LC)]


def histograms(counts: RoutingCounts) -> list[Summary.Value]:
    """Return the histograms of the number of true experts a token: of all layers together, and of each."""
    values = [(TRUE_EXPERTS_OF_TOKENS, counts.tokens_by_load_LC.sum(axis=0))]
    for layer, tokens_C in zip(counts.layers, counts.tokens_by_load_LC, strict=True):
        values.append((f"{TRUE_EXPERTS_OF_LAYER}/{layer:02d}", tokens_C))
    return [_histogram(tag, tokens_C) for tag, tokens_C in values if tokens_C.sum()]


def _histogram(tag: str, tokens_C: Array) -> Summary.Value:
    """Return the counts as they are: a bucket around each number, from the first to the last that has tokens.

    TensorBoard takes the smallest and the largest value for the ends of the outermost buckets.
    """
    numbers_C = np.arange(len(tokens_C))
    found = np.nonzero(tokens_C)[0]
    kept = slice(found[0], found[-1] + 1)
    histogram = HistogramProto(
        min=found[0] - 0.5,
        max=found[-1] + 0.5,
        num=tokens_C.sum(),
        sum=(numbers_C * tokens_C).sum(),
        sum_squares=(numbers_C**2 * tokens_C).sum(),
        bucket_limit=numbers_C[kept] + 0.5,
        bucket=tokens_C[kept],
    )
    return Summary.Value(tag=tag, histo=histogram)


def _image(tag: str, heat_map: HeatMap, values: Array) -> Summary.Value:
    png, width, height = heat_map.png(values)
    return Summary.Value(
        tag=tag, image=Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    )
