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


def sigmoid(values: list[float]) -> list[float]:
    return [1.0 / (1.0 + math.exp(-value)) if value > -700 else 0.0 for value in values]


def selection(
    row: list[float], num_true: int, k: int, function: str = "softmax", bias: list[float] | None = None
) -> list[int]:
    """Columns chosen, best first; Python's sort is stable, so the lowest of equals wins."""
    if bias is None:
        return top_k(row, k)
    scores = softmax(row) if function == "softmax" else sigmoid(row)
    return top_k([score + (bias[i] if i < num_true else 0.0) for i, score in enumerate(scores)], k)


def column_weights(
    row: list[float],
    num_true: int,
    k: int,
    normalize: str,
    function: str = "softmax",
    bias: list[float] | None = None,
    num_with_output: int = 0,
) -> list[float]:
    """Weights of all n + m columns of one token: 0 where not selected and for zero experts."""
    chosen = selection(row, num_true, k, function, bias)
    if function == "sigmoid":
        mass = dict(enumerate(sigmoid(row)))
        total = math.fsum(mass[column] for column in chosen)
        if normalize == "all_selected":
            mass = {column: mass[column] / total for column in chosen}
    elif normalize == "none":
        mass = dict(enumerate(softmax(row)))
    elif normalize == "all_true":
        mass = dict(enumerate(softmax(row[:num_true])))
    else:
        mass = dict(zip(chosen, softmax([row[column] for column in chosen]), strict=True))
    working = [column for column in chosen if column < num_true or column >= len(row) - num_with_output]
    scale = math.fsum(mass[column] for column in working) if normalize == "true_experts" and working else 1.0
    return [mass[column] / scale if column in working else 0.0 for column in range(len(row))]


def weights(row: list[float], num_true: int, k: int, normalize: str) -> list[float]:
    """Eq. 1: weights of the true experts of one token, by softmax first and division afterwards."""
    return column_weights(row, num_true, k, normalize)[:num_true]


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


def probabilities(rows: Rows, function: str = "softmax") -> list[float]:
    """Eq. 5: the mean probability of each expert over all logits."""
    table = [softmax(row) if function == "softmax" else shares(sigmoid(row)) for row in rows]
    return [math.fsum(column) / len(rows) for column in zip(*table, strict=True)]


def shares(values: list[float]) -> list[float]:
    return [value / math.fsum(values) for value in values]


def balance(
    rows: Rows,
    num_true: int,
    k: int,
    kind: str,
    padding: list[bool],
    loads: list[float] | None = None,
    function: str = "softmax",
    target: float | None = None,
) -> float:
    """Eq. 6 (`null_averaged`), ZEDA's loss times k (`grouped`) or eq. 3 over all experts (`switch`).

    At fixed `loads` where they are given.
    """
    rows = real_rows(rows, padding)
    if not rows:
        return 0.0
    load = list(fractions(rows, k) if loads is None else loads)
    chances = probabilities(rows, function)
    if kind == "grouped":
        return zeda(load, chances, num_true, k, target)
    if kind == "null_averaged" and len(load) > num_true:
        mean = math.fsum(load[num_true:]) / (len(load) - num_true)
        load[num_true:] = [mean] * (len(load) - num_true)
    return len(load) * math.fsum(f * p for f, p in zip(load, chances, strict=True))


def zeda(load: list[float], chances: list[float], num_true: int, k: int, target: float | None) -> float:
    """k times ZEDA's formula as printed, with the weight w of a null expert that the target rate implies."""
    num_null = len(load) - num_true
    rate = num_null / len(load) if target is None else target
    w = rate * num_true / ((1 - rate) * num_null)
    total = num_true + num_null * w
    true = math.fsum(load[:num_true]) * math.fsum(chances[:num_true]) / num_true
    null = math.fsum(load[num_true:]) * math.fsum(chances[num_true:]) / (num_null * w)
    return k * total / k * (true + null)


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
