"""The paper's formulas, token by token in plain Python, and a numerical gradient: slow and independent.

A row is the list of one token's logits, true experts first; padding is a list of booleans.
"""

import math
from collections.abc import Callable

Rows = list[list[float]]


def softmax(values: list[float]) -> list[float]:
    highest = max(values)
    exponentials = [math.exp(value - highest) for value in values]
    return [value / math.fsum(exponentials) for value in exponentials]


def top_k(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda column: -row[column])[:k]


def weights(row: list[float], num_true: int, k: int, normalize: str) -> list[float]:
    """Eq. 1: weights of the true experts of one token, by softmax first and division afterwards."""
    chosen = top_k(row, k)
    if normalize == "none":
        mass = dict(enumerate(softmax(row)))
    else:
        mass = dict(zip(chosen, softmax([row[column] for column in chosen]), strict=True))
    true = [column for column in chosen if column < num_true]
    scale = math.fsum(mass[column] for column in true) if normalize == "true_experts" and true else 1.0
    return [mass[expert] / scale if expert in true else 0.0 for expert in range(num_true)]


def all_weights(rows: Rows, num_true: int, k: int, normalize: str, padding: list[bool]) -> Rows:
    return [
        [0.0] * num_true if pad else weights(row, num_true, k, normalize)
        for row, pad in zip(rows, padding, strict=True)
    ]


def combine(weights_of_token: list[float], expert_outputs: Rows) -> list[float]:
    """Eq. 2: the weighted sum of one token's expert outputs."""
    width = len(expert_outputs[0])
    return [
        math.fsum(w * output[i] for w, output in zip(weights_of_token, expert_outputs, strict=True))
        for i in range(width)
    ]


def real_rows(rows: Rows, padding: list[bool]) -> Rows:
    return [row for row, pad in zip(rows, padding, strict=True) if not pad]


def fractions(rows: Rows, k: int) -> list[float]:
    """Eq. 4: the fraction of tokens that select each expert."""
    chosen = [top_k(row, k) for row in rows]
    return [sum(column in picks for picks in chosen) / len(rows) for column in range(len(rows[0]))]


def probabilities(rows: Rows) -> list[float]:
    """Eq. 5: the mean probability of each expert over all logits."""
    table = [softmax(row) for row in rows]
    return [math.fsum(column) / len(rows) for column in zip(*table, strict=True)]


def balance(
    rows: Rows, num_true: int, k: int, kind: str, padding: list[bool], loads: list[float] | None = None
) -> float:
    """Eq. 6 (`null_averaged`) or eq. 3 over all experts (`switch`), at fixed `loads` where they are given."""
    rows = real_rows(rows, padding)
    if not rows:
        return 0.0
    load = list(fractions(rows, k) if loads is None else loads)
    if kind == "null_averaged" and len(load) > num_true:
        mean = math.fsum(load[num_true:]) / (len(load) - num_true)
        load[num_true:] = [mean] * (len(load) - num_true)
    return len(load) * math.fsum(f * p for f, p in zip(load, probabilities(rows), strict=True))


def z_loss(rows: Rows, padding: list[bool]) -> float:
    squares = [math.log(math.fsum(map(math.exp, row))) ** 2 for row in real_rows(rows, padding)]
    return math.fsum(squares) / len(squares) if squares else 0.0


def gradient(function: Callable[[Rows], float], rows: Rows, step: float = 1e-5) -> Rows:
    """Central differences of a scalar function of the logits."""
    result = []
    for token, row in enumerate(rows):
        result.append([])
        for column in range(len(row)):
            values = []
            for sign in (1, -1):
                moved = [list(other) for other in rows]
                moved[token][column] += sign * step
                values.append(function(moved))
            result[-1].append((values[0] - values[1]) / (2 * step))
    return result
