"""Loads by layer, class, position and token: pure functions of what the routers decided. Axes: L layers, T tokens."""

import math
from dataclasses import dataclass

import numpy as np

from adamoe_dist.inspection.classes import Grouping
from adamoe_dist.inspection.record import Array, Routing, TokenizedText

MINIMUM_COUNT = 30
"""Tokens below which nothing is said of a class, and no expert is called specialised."""
MINIMUM_REPEATS = 8
"""Occurrences below which a single token is not listed."""
POSITION_BINS = 16


@dataclass(frozen=True)
class Load:
    """The load over some tokens.

    Attributes:
        label: which tokens.
        tokens: how many.
        mean: true experts a token, mean over tokens and layers.
        error: standard error of ``mean``, from the spread between tokens of their means over layers; NaN for one token.
        null_share: part of the k slots that had no true expert.
        all_null_share: part of the (token, layer) pairs without a true expert.
    """

    label: str
    tokens: int
    mean: float
    error: float
    null_share: float
    all_null_share: float


def load_of(label: str, loads_LT: Array, top_k: int) -> Load:
    """Return the load over the tokens of ``loads_LT``, of which there is at least one."""
    tokens = loads_LT.shape[1]
    means_T = loads_LT.mean(axis=0, dtype=np.float64)
    error = float(means_T.std(ddof=1)) / math.sqrt(tokens) if tokens > 1 else math.nan
    mean = float(means_T.mean())
    return Load(label, tokens, mean, error, 1.0 - mean / top_k, float((loads_LT == 0).mean()))


def loads_by_layer(routing: Routing) -> list[Load]:
    """Return the load of each layer."""
    return [
        load_of(f"layer {layer.number}", loads_T[None, :], routing.top_k)
        for layer, loads_T in zip(routing.layers, routing.loads_LT, strict=True)
    ]


def loads_by_class(routing: Routing, grouping: Grouping) -> list[Load]:
    """Return the load of each class of a grouping."""
    return [load_of(label, routing.loads_LT[:, grouping.mask_T(label)], routing.top_k) for label in grouping.labels]


def loads_by_position(routing: Routing, text: TokenizedText) -> list[Load]:
    """Return the load of up to 16 ranges of positions, equally long, that have tokens."""
    end = int(text.positions_T.max()) + 1
    width = max(math.ceil(end / POSITION_BINS), 1)
    ranges = [(start, min(start + width, end)) for start in range(0, end, width)]
    loads = []
    for start, stop in ranges:
        mask_T = (text.positions_T >= start) & (text.positions_T < stop)
        label = f"{start}" if stop - start == 1 else f"{start} to {stop - 1}"
        if mask_T.any():
            loads.append(load_of(label, routing.loads_LT[:, mask_T], routing.top_k))
    return loads


def loads_by_token(routing: Routing, text: TokenizedText, minimum: int = MINIMUM_REPEATS) -> list[Load]:
    """Return the load of each token that occurs ``minimum`` times or more, the lowest first."""
    found = [load_of(label, routing.loads_LT[:, place], routing.top_k) for label, place in text.places(minimum)]
    return sorted(found, key=lambda load: (load.mean, -load.tokens, load.label))


def explained_by_token(routing: Routing, text: TokenizedText, minimum: int = MINIMUM_REPEATS) -> tuple[float, int]:
    """Return the part of the variance of the tokens' mean loads that lies between different tokens, and their number.

    Of the tokens that occur ``minimum`` times or more. The mean square within tokens is set against the whole one, so
    that loads which do not depend on the token give 0 on average, however few tokens there are (it can be below 0).
    NaN where there are fewer than two such tokens or no variance.
    """
    _, inverse_T, counts_U = np.unique(text.ids_T, return_inverse=True, return_counts=True)
    kept_T = counts_U[inverse_T] >= minimum
    means_T = routing.mean_loads_T[kept_T]
    _, inverse_T = np.unique(inverse_T[kept_T], return_inverse=True)
    groups = int(inverse_T.max()) + 1 if len(inverse_T) else 0
    if groups < 2 or np.ptp(means_T) == 0.0:
        return math.nan, len(means_T)
    sums_U, counts_U = np.bincount(inverse_T, weights=means_T), np.bincount(inverse_T)
    within = float(((means_T - (sums_U / counts_U)[inverse_T]) ** 2).sum()) / (len(means_T) - groups)
    return 1.0 - within / float(means_T.var(ddof=1)), len(means_T)
