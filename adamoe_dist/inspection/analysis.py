"""All numbers of a report."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from adamoe_dist.inspection.classes import Grouping, classify
from adamoe_dist.inspection.comparison import (
    Difference,
    difference_of,
    differences_by_class,
    differences_by_layer,
    differences_by_token,
)
from adamoe_dist.inspection.experts import Preference, coactivation_EE, lift_EC, preferences, relative_loads_LE
from adamoe_dist.inspection.record import Array, Routing, TokenizedText
from adamoe_dist.inspection.statistics import (
    Load,
    explained_by_token,
    load_of,
    loads_by_class,
    loads_by_layer,
    loads_by_position,
    loads_by_token,
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """The first model minus the second, over the same tokens.

    Attributes:
        other: what the second model's routers decided.
        overall: over all tokens.
        layers: by layer; empty where the two have experts in other layers.
        classes: by class, for each grouping.
        tokens: by token, the most lowered first.
    """

    other: Routing
    overall: Difference
    layers: list[Difference]
    classes: list[list[Difference]]
    tokens: list[Difference]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a report says.

    Attributes:
        text: the tokens.
        routing: what the routers decided.
        groupings: the classes of tokens.
        overall: the load of all tokens.
        layers: loads by layer.
        classes: loads by class, for each grouping.
        positions: loads by position in the window.
        tokens: loads by token, the lowest first.
        explained: part of the variance of tokens' loads that lies between different tokens; NaN: unknown.
        explained_tokens: the tokens that ``explained`` is about.
        relative_LE: each expert's tokens over the mean of its layer's experts.
        preferences: experts that prefer a class, the strongest first.
        comparison: with a second model.
    """

    text: TokenizedText
    routing: Routing
    groupings: list[Grouping]
    overall: Load
    layers: list[Load]
    classes: list[list[Load]]
    positions: list[Load]
    tokens: list[Load]
    explained: float
    explained_tokens: int
    relative_LE: Array
    preferences: list[Preference]
    comparison: Comparison | None

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as plain values; NaN becomes None."""
        groupings = [
            {"name": grouping.name, "rule": grouping.rule, "classes": [asdict(load) for load in loads]}
            for grouping, loads in zip(self.groupings, self.classes, strict=True)
        ]
        values = {
            "model": self.routing.description,
            "num_experts": self.routing.num_experts,
            "num_null_experts": self.routing.num_null,
            "top_k": self.routing.top_k,
            "sources": list(self.text.sources),
            "files": [asdict(part) for part in self.text.parts],
            "context": self.text.context,
            "overall": asdict(self.overall),
            "layers": [asdict(load) for load in self.layers],
            "groupings": groupings,
            "positions": [asdict(load) for load in self.positions],
            "tokens": [asdict(load) for load in self.tokens],
            "variance_between_tokens": self.explained,
            "variance_tokens": self.explained_tokens,
            "experts": [self._experts_json(index) for index in range(len(self.layers))],
            "preferences": [asdict(one) for one in self.preferences],
            "comparison": None if self.comparison is None else self._comparison_json(self.comparison),
        }
        plain: dict[str, Any] = _without_nan(values)
        return plain

    def _experts_json(self, index: int) -> dict[str, Any]:
        layer = self.routing.layers[index]
        return {
            "layer": layer.number,
            "relative_load": self.relative_LE[index].tolist(),
            "lift": {
                grouping.name: {"classes": list(grouping.labels), "by_expert": lift_EC(layer, grouping).tolist()}
                for grouping in self.groupings
            },
            "coactivation": coactivation_EE(layer).tolist(),
        }

    def _comparison_json(self, comparison: Comparison) -> dict[str, Any]:
        return {
            "model": comparison.other.description,
            "overall": asdict(comparison.overall),
            "layers": [asdict(one) for one in comparison.layers],
            "groupings": [
                {"name": grouping.name, "classes": [asdict(one) for one in differences]}
                for grouping, differences in zip(self.groupings, comparison.classes, strict=True)
            ],
            "tokens": [asdict(one) for one in comparison.tokens],
        }


def analyse(text: TokenizedText, routing: Routing, other: Routing | None = None) -> Analysis:
    """Compute all numbers of a report.

    Args:
        text: the tokens.
        routing: what the routers decided about them.
        other: what those of a second model did.
    """
    groupings = classify(text.texts)
    explained, explained_tokens = explained_by_token(routing, text)
    return Analysis(
        text,
        routing,
        groupings,
        load_of("all tokens", routing.loads_LT, routing.top_k),
        loads_by_layer(routing),
        [loads_by_class(routing, grouping) for grouping in groupings],
        loads_by_position(routing, text),
        loads_by_token(routing, text),
        explained,
        explained_tokens,
        relative_loads_LE(routing),
        preferences(routing, groupings),
        None if other is None else compare(text, routing, other, groupings),
    )


def compare(text: TokenizedText, first: Routing, second: Routing, groupings: list[Grouping]) -> Comparison:
    """Compare two models over one text, token by token."""
    return Comparison(
        second,
        difference_of("all tokens", first.mean_loads_T, second.mean_loads_T),
        differences_by_layer(first, second),
        [differences_by_class(first, second, grouping) for grouping in groupings],
        differences_by_token(first, second, text),
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
