"""The pictures of a report. Axes: E true experts, C classes."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adamoe_dist.inspection.analysis import Analysis
from adamoe_dist.inspection.charts import Column, bar_table, heat_map
from adamoe_dist.inspection.comparison import Difference
from adamoe_dist.inspection.drawing import Drawing
from adamoe_dist.inspection.experts import coactivation_EE, lift_EC
from adamoe_dist.inspection.record import Array, LayerRoutes
from adamoe_dist.inspection.statistics import MINIMUM_COUNT, Load

SHOWN_EXPERTS = 32
_FIGURE = re.compile(
    r"(load_by_(layer|position|class_\d+)|expert_load|(preferences|coactivation)_layer_\d{3,}"
    r"|difference_by_(layer|class_\d+))\.png"
)


def load_chart(title: str, loads: Sequence[Load], analysis: Analysis, needs_support: bool = True) -> Drawing:
    """Return bars of the mean load, the null share and the part without an expert, with the number of tokens."""
    few = [needs_support and load.tokens < MINIMUM_COUNT for load in loads]
    labels = [
        f"{load.label} ({load.tokens:,})" + (" *" if is_few else "") for load, is_few in zip(loads, few, strict=True)
    ]
    mean = Column(
        "true experts a token",
        [load.mean for load in loads],
        [f"{load.mean:.2f}" for load in loads],
        max(max(load.mean for load in loads), analysis.overall.mean),
        marked=analysis.overall.mean,
    )
    return bar_table(
        title,
        labels,
        [
            mean,
            _shares("null share of the slots", [load.null_share for load in loads]),
            _shares("without any true expert", [load.all_null_share for load in loads]),
        ],
    )


def _shares(title: str, parts: Sequence[float]) -> Column:
    return Column(title, parts, [f"{100 * part:.1f} %" for part in parts], 1.0)


def difference_chart(title: str, differences: Sequence[Difference]) -> Drawing:
    """Return bars of differences around a middle, with both loads."""
    highest = max(max(abs(one.difference) for one in differences), 0.1)
    return bar_table(
        title,
        [f"{one.label} ({one.tokens:,})" + (" *" if one.tokens < MINIMUM_COUNT else "") for one in differences],
        [
            Column(
                "this model minus the other",
                [one.difference for one in differences],
                [f"{one.difference:+.2f} ({one.first:.2f}, {one.second:.2f})" for one in differences],
                highest,
                is_signed=True,
            )
        ],
    )


def expert_load_map(analysis: Analysis) -> Drawing:
    """Return each layer's experts, by their tokens relative to the layer's mean; the busiest where they are many."""
    relative_LE = analysis.relative_LE
    kept = _strongest(relative_LE.max(axis=0))
    values = relative_LE[:, kept].tolist()
    return heat_map(
        "Tokens of each expert, 1 is an even share" + _of(kept, relative_LE.shape[1]),
        [f"layer {layer.number}" for layer in analysis.routing.layers],
        [str(expert) for expert in kept],
        values,
        [[f"{value:.2f}" for value in row] for row in values],
        3.0,
    )


def preference_map(analysis: Analysis, layer: LayerRoutes) -> Drawing:
    """Return the experts of a layer and the classes that they prefer or avoid."""
    labels: list[str] = []
    lifts: list[Array] = []
    for grouping in analysis.groupings:
        lift = lift_EC(layer, grouping)
        for index, label in enumerate(grouping.labels):
            if np.isfinite(lift[:, index]).any():
                labels.append(label)
                lifts.append(lift[:, index])
    values_EC = np.stack(lifts, axis=1) if lifts else np.zeros((layer.selected_TE.shape[1], 0))
    kept = _strongest(np.nan_to_num(np.abs(_log2(values_EC))).max(axis=1, initial=0.0))
    return _ratio_map(
        f"Layer {layer.number}: part of a class among an expert's tokens over its part in the text"
        + _of(kept, values_EC.shape[0]),
        [f"expert {expert}" for expert in kept],
        labels,
        values_EC[kept],
    )


def coactivation_map(layer: LayerRoutes) -> Drawing:
    """Return how often two experts of a layer share a token, relative to independence."""
    ratio_EE = coactivation_EE(layer)
    kept = _strongest(layer.selected_TE.sum(axis=0))
    return _ratio_map(
        f"Layer {layer.number}: tokens that two experts share, over what independence would give"
        + _of(kept, ratio_EE.shape[0]),
        [f"expert {expert}" for expert in kept],
        [str(expert) for expert in kept],
        ratio_EE[np.ix_(kept, kept)],
    )


def all_figures(analysis: Analysis) -> dict[str, Drawing]:
    """Return every picture by the name of its PNG file."""
    figures = {"load_by_layer": load_chart("Load by layer (tokens)", analysis.layers, analysis)}
    for number, (grouping, loads) in enumerate(zip(analysis.groupings, analysis.classes, strict=True), start=1):
        if loads:
            figures[f"load_by_class_{number}"] = load_chart(
                f"Load by {_small(grouping.name)} (tokens)", loads, analysis
            )
    figures["load_by_position"] = load_chart("Load by position in the window (tokens)", analysis.positions, analysis)
    figures["expert_load"] = expert_load_map(analysis)
    for layer in analysis.routing.layers:
        figures[f"preferences_layer_{layer.number:03d}"] = preference_map(analysis, layer)
        figures[f"coactivation_layer_{layer.number:03d}"] = coactivation_map(layer)
    if analysis.comparison is not None:
        comparison = analysis.comparison
        if comparison.layers:
            figures["difference_by_layer"] = difference_chart("Difference by layer (tokens)", comparison.layers)
        for number, (grouping, differences) in enumerate(
            zip(analysis.groupings, comparison.classes, strict=True), start=1
        ):
            if differences:
                title = f"Difference by {_small(grouping.name)} (tokens)"
                figures[f"difference_by_class_{number}"] = difference_chart(title, differences)
    return figures


def is_figure(path: Path) -> bool:
    """Tell whether a file has the name of a picture of a report."""
    return _FIGURE.fullmatch(path.name) is not None


def _ratio_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Array) -> Drawing:
    """Return a map of ratios, shaded by their logarithm: 4 is the strongest orange, 1/4 the strongest blue."""
    texts = [["" if math.isnan(value) else _ratio(value) for value in row] for row in values.tolist()]
    return heat_map(f"{title}; triangle: orange", rows, columns, _log2(values).tolist(), texts, 2.0, is_signed=True)


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.095 or value == 0 else f"{value:.2f}"


def _log2(values: Array) -> Array:
    logarithms: Array = np.log2(np.maximum(values, 2.0**-6))
    return logarithms


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]


def _strongest(strength_E: Array) -> list[int]:
    """Return the numbers of the 32 strongest experts, in ascending order."""
    order: list[int] = np.argsort(-strength_E, kind="stable")[:SHOWN_EXPERTS].tolist()
    return sorted(order)


def _of(kept: Sequence[int], experts: int) -> str:
    return f" ({len(kept)} of {experts} experts)" if len(kept) < experts else ""
