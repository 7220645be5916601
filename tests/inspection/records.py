"""Random routings over small texts, and slow counts of them, token by token."""

import math

import numpy as np

from adamoe_dist.inspection import FilePart, LayerRoutes, Routing, TokenizedText

PHRASE = ["The", " cat", " sat", " on", " the", " mat", ",", " and", " 12", " dogs", " ran", ".", "\n"]


def text_of(tokens: list[str], context: int = 8, files: int = 1) -> TokenizedText:
    ids = {text: number for number, text in enumerate(dict.fromkeys(tokens))}
    cut = np.arange(len(tokens)) * files // max(len(tokens), 1)
    places, previous = [], -1
    for number in cut:
        places.append(1 if number != previous else places[-1] + 1)
        previous = number
    sources = tuple(f"file {number}.txt" for number in range(files))
    positions = np.array(places) % context
    names = {number: f"<{number}>" for number in ids.values()}
    counts = np.bincount(cut, minlength=files).tolist()
    parts = tuple(FilePart(source, count, count, 1.0) for source, count in zip(sources, counts, strict=True))
    ids_T = np.array([ids[one] for one in tokens])
    return TokenizedText(sources, ids_T, tuple(tokens), positions, cut, context, names, parts)


def routing_of(
    tokens: int, layers: int = 3, experts: int = 5, top_k: int = 3, num_null: int = 4, seed: int = 0
) -> Routing:
    draws = np.random.default_rng(seed)
    found = []
    for number in range(layers):
        scores = draws.normal(size=(tokens, experts + num_null))
        selected = np.zeros((tokens, experts + num_null), dtype=bool)
        np.put_along_axis(selected, np.argsort(-scores, axis=1)[:, :top_k], True, axis=1)
        weights = np.exp(scores[:, :experts]) * selected[:, :experts]
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
        found.append(LayerRoutes(2 * number + 1, selected[:, :experts], weights.astype(np.float16)))
    return Routing.of("a model", num_null, top_k, found)


def slow_load(routing: Routing, tokens: list[int]) -> dict[str, float]:
    """Count the load of some tokens one by one."""
    total = without = 0
    means = []
    for token in tokens:
        of_token = 0
        for layer in routing.layers:
            used = sum(1 for chosen in layer.selected_TE[token] if chosen)
            of_token += used
            without += used == 0
        total += of_token
        means.append(of_token / len(routing.layers))
    pairs = len(tokens) * len(routing.layers)
    mean = total / pairs
    spread = sum((one - mean) ** 2 for one in means)
    error = math.sqrt(spread / (len(tokens) - 1) / len(tokens)) if len(tokens) > 1 else math.nan
    slots = pairs * routing.top_k
    return {"mean": mean, "error": error, "null_share": (slots - total) / slots, "all_null_share": without / pairs}
