"""What the page's script needs, small: numbers as bytes in base64. Axes: L layers, T tokens, E true experts."""

import base64
import json
from typing import Any

import numpy as np

from adamoe_dist.inspection.analysis import Analysis
from adamoe_dist.inspection.record import Array, Routing

WEIGHT_STEPS = 255


def payload(analysis: Analysis) -> dict[str, Any]:
    """Return the data of the page's script.

    ``loads`` holds L x T bytes. ``experts`` and ``weights`` hold the numbers and combine weights of the true experts of
    one token after the other, those of the heaviest first; where each token's begin follows from the loads. A weight is
    a byte, 255 times itself. Arrays of numbers above 255 are little-endian uint16 (``wide`` names them).
    """
    routing, text = analysis.routing, analysis.text
    experts, weights = chosen_experts(routing)
    wide = {
        "experts": routing.num_experts > 256,
        "positions": True,
    }
    classes = {grouping.name: _base64(grouping.classes_T, False, offset=1) for grouping in analysis.groupings}
    return {
        "k": routing.top_k,
        "n": routing.num_experts,
        "tokens": len(text),
        "layers": [layer.number for layer in routing.layers],
        "wide": wide,
        "loads": _base64(routing.loads_LT, False),
        "experts": _base64(experts, wide["experts"]),
        "weights": _base64(weights, False),
        "positions": _base64(text.positions_T, True),
        "labels": {grouping.name: list(grouping.labels) for grouping in analysis.groupings},
        "classes": classes,
        "meanScale": list(mean_scale(routing)),
        "other": None if analysis.comparison is None else _other(routing, analysis.comparison.other),
    }


def _other(routing: Routing, other: Routing) -> dict[str, Any]:
    """Return the second model's loads; by layer only where the layers are the same."""
    same = [layer.number for layer in other.layers] == [layer.number for layer in routing.layers]
    differences_T = routing.mean_loads_T - other.mean_loads_T
    return {
        "layers": [layer.number for layer in other.layers],
        "sameLayers": same,
        "loads": _base64(other.loads_LT, False),
        "meanScale": float(max(np.quantile(np.abs(differences_T), 0.98), 0.1)),
        "scale": max(routing.top_k, other.top_k),
    }


def as_script_data(values: dict[str, Any]) -> str:
    """Return JSON that may stand in a script element: no sign in it can end the element."""
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def chosen_experts(routing: Routing) -> tuple[Array, Array]:
    """Return the true experts of all tokens of all layers in a row, and their weights as bytes."""
    experts, weights = [], []
    for layer in routing.layers:
        tokens_R, experts_R = np.nonzero(layer.selected_TE)
        weights_R = layer.weights_TE[tokens_R, experts_R].astype(np.float64)
        order_R = np.lexsort((experts_R, -weights_R, tokens_R))
        experts.append(experts_R[order_R])
        weights.append(np.rint(np.clip(weights_R[order_R], 0.0, 1.0) * WEIGHT_STEPS))
    return np.concatenate(experts), np.concatenate(weights)


def mean_scale(routing: Routing) -> tuple[float, float]:
    """Return the mean loads of the lightest and of the darkest shade: between them lie 96 % of the tokens."""
    low, high = (float(value) for value in np.quantile(routing.mean_loads_T, (0.02, 0.98)))
    return (low, high) if high - low >= 0.1 else (max(low - 0.05, 0.0), high + 0.05)


def _base64(values: Array, is_wide: bool, offset: int = 0) -> str:
    kind = np.dtype("<u2") if is_wide else np.dtype(np.uint8)
    shifted = values + offset
    assert shifted.size == 0 or 0 <= shifted.min() <= shifted.max() <= np.iinfo(kind).max, (
        shifted.min(),
        shifted.max(),
    )
    return base64.b64encode(shifted.astype(kind).tobytes()).decode("ascii")
