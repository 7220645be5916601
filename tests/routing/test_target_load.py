"""The rule that holds the load: against plain Python, and against a router that does not know of it."""

from fractions import Fraction

import pytest
import torch

from adamoe_dist.routing import (
    biased_scores,
    decayed_rate,
    gain,
    load_slope,
    margin_counts,
    margin_edges,
    margins,
    score_unit,
    select,
    updated_bias,
)
from tests.routing import reference
from tests.routing.examples import distinct_logits, some_padding

MODES = ("true_experts", "all_selected", "all_true", "none")


def slow_rule(
    bias: list[float], chosen: list[list[int]], top_k: int, target: float, mu: float, evenness: float
) -> list[float]:
    """LongCat's update, expert by expert in exact fractions, from the experts that each token chose.

    With ``evenness`` other than 1, the error is taken apart into that of the load, spread over all, and the rest.
    """
    load = Fraction(sum(len(experts) for experts in chosen), len(chosen))
    common = (Fraction(target) - load) / (top_k * len(bias))
    moved = []
    for expert, value in enumerate(bias):
        tokens = sum(expert in experts for experts in chosen)
        own = Fraction(target) / top_k / len(bias) - Fraction(tokens, top_k * len(chosen))
        error = own if evenness == 1 else common + Fraction(evenness) * (own - common)
        moved.append(float(Fraction(value) + Fraction(mu) * error))
    return moved


@pytest.mark.parametrize(
    ("num_true", "num_null", "top_k", "target"), [(8, 8, 3, 1.2), (5, 2, 4, 3.5), (64, 64, 8, 3.0)]
)
@pytest.mark.parametrize("evenness", [1, 0.2])
def test_the_rule_equals_the_slow_one(num_true, num_null, top_k, target, evenness):
    logits = distinct_logits(37, num_true + num_null, seed=top_k)
    padding = some_padding(37, seed=1)
    selection = select(logits, num_true, top_k, "none", padding)
    bias = torch.randn(num_true, generator=torch.Generator().manual_seed(2))
    counts = selection.routing_map_TE.sum(dim=0)
    actual = updated_bias(bias, counts, (~padding).sum(), top_k, target, 0.3, evenness)
    chosen = [
        [expert for expert in reference.top_k(row, top_k) if expert < num_true]
        for row, pad in zip(logits.tolist(), padding.tolist(), strict=True)
        if not pad
    ]
    expected = torch.tensor(slow_rule(bias.tolist(), chosen, top_k, target, 0.3, evenness))
    assert actual.dtype == torch.float32 and not torch.equal(actual, bias)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


def test_a_batch_without_real_tokens_moves_nothing():
    bias = torch.tensor([0.5, -0.25])
    nothing = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(updated_bias(bias, nothing, torch.tensor(0), 3, 1.0, 5.0), bias)


def slow_choice(row: list[float], bias: list[float], k: int) -> list[int]:
    scores = reference.softmax(row)
    return reference.top_k([s + (bias[i] if i < len(bias) else 0.0) for i, s in enumerate(scores)], k)


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_selects_and_leaves_weights_and_gradients_alone(mode):
    """Forward and gradient against plain Python: the weights are those of the unbiased scores of what is selected."""
    logits = distinct_logits(12, 14, seed=3)
    bias = torch.linspace(-0.1, 0.1, 8, dtype=torch.float64)
    cotangent = torch.randn(12, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chosen = [slow_choice(row, bias.tolist(), 3) for row in logits.tolist()]
    assert chosen != [reference.top_k(row, 3) for row in logits.tolist()], "the bias must change something"

    def weights(rows):
        table = []
        for row, columns in zip(rows, chosen, strict=True):
            true = [column for column in columns if column < 8]
            scaled_over = {"true_experts": true, "all_selected": columns, "all_true": range(8), "none": range(14)}[mode]
            mass = dict(zip(scaled_over, reference.softmax([row[c] for c in scaled_over]), strict=True)) if true else {}
            table.append([mass[expert] if expert in true else 0.0 for expert in range(8)])
        return table

    def task_loss(rows):
        return sum(
            g * w for gs, ws in zip(cotangent.tolist(), weights(rows), strict=True) for g, w in zip(gs, ws, strict=True)
        )

    leaf, bias_leaf = logits.clone().requires_grad_(), bias.clone().requires_grad_()
    selection = select(leaf, 8, 3, mode, bias_E=bias_leaf)
    assert [sorted(row) for row in selection.top_indices_TK.tolist()] == [sorted(columns) for columns in chosen]
    expected = torch.tensor(weights(logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(selection.probs_TE, expected, rtol=1e-12, atol=1e-15)
    (selection.probs_TE * cotangent).sum().backward()
    gradient = torch.tensor(reference.gradient(task_loss, logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=1e-8)
    assert bias_leaf.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_a_bias_of_zero_selects_as_none_does(mode):
    logits = distinct_logits(64, 24, seed=4)
    padding = some_padding(64, seed=2)
    plain, biased = (select(logits, 8, 4, mode, padding, bias_E=bias) for bias in (None, torch.zeros(8).double()))
    assert torch.equal(plain.selected_TA, biased.selected_TA)
    assert torch.equal(plain.probs_TE, biased.probs_TE)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_a_bias_of_one_shuts_null_experts_out_and_keeps_the_order_of_the_true_ones_to_the_bit(function):
    """Scores as small as those of 512 experts: a 1 added to them would leave 24 bits of which theirs fill few."""
    logits = 2 * torch.randn(4096, 1024, generator=torch.Generator().manual_seed(11))
    logits[:64, 512:] += 200.0  # null scores of 1, true ones of 0
    selection = select(logits, 512, 8, "true_experts", score_function=function, bias_E=torch.ones(512))
    assert not selection.null_map_TN.any()
    plain = biased_scores(logits, function, torch.zeros(512))[:, :512]
    wanted = plain.sort(dim=1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(selection.top_indices_TK, wanted)


def test_margins_are_the_smallest_common_moves_that_change_a_load():
    logits = distinct_logits(40, 14, seed=6)
    padding = some_padding(40, seed=3)
    bias = torch.linspace(-0.05, 0.05, 6, dtype=torch.float64)
    selection = select(logits, 6, 4, "none", padding, bias_E=bias)
    found = margins(biased_scores(logits, "softmax", bias), selection.selected_TA, 6)
    loads = selection.routing_map_TE.sum(dim=1)
    assert found[padding].isinf().all()
    for token in (~padding).nonzero().flatten().tolist():
        row, margin = logits[token : token + 1], float(found[token])
        assert margin > 0

        def loads_at(move: float, row=row) -> list[int]:
            moved = [select(row, 6, 4, "none", bias_E=bias + sign * move) for sign in (1, -1)]
            return [int(selection.routing_map_TE.sum()) for selection in moved]

        assert loads_at(margin * 0.999) == [int(loads[token])] * 2
        assert loads_at(margin * 1.001) != [int(loads[token])] * 2


def test_margins_are_counted_by_size_and_padding_is_not():
    edges = margin_edges()
    values = torch.tensor([0.0, float(edges[0]), float(edges[0]) * 1.01, 0.03, 4.0, 5.0, float("inf")]).double()
    counts = margin_counts(values)
    assert counts.dtype == torch.int64 and counts.sum() == 5
    assert counts[0] == 2 and counts[1] == 1 and counts[-1] == 1
    bin_of = int(counts[2:-1].nonzero()) + 2
    assert edges[bin_of - 1] < 0.03 <= edges[bin_of]
    assert torch.equal(margin_counts(values[:3]) + margin_counts(values[3:]), counts)


def scores_of(kind: str, logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, dim=1) if kind == "softmax" else torch.sigmoid(logits)


def biased_selection(kind, logits, bias, top_k):
    """What is selected, and its scores: by `select` for softmax, by its formula for sigmoid."""
    if kind == "softmax":
        scores = biased_scores(logits, "softmax", bias)
        return select(logits, bias.shape[0], top_k, "none", bias_E=bias).selected_TA, scores
    scores = scores_of(kind, logits)
    scores[:, : bias.shape[0]] += bias
    chosen = torch.topk(scores, top_k, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True), scores


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("spread", [0.15, 2.0])
def test_the_slope_is_that_of_the_load(kind, spread):
    """Within a factor of 1.6 of the load's change for a small common move of the bias, for narrow and wide scores."""
    logits = spread * torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(8)
    selected, scores = biased_selection(kind, logits, bias, 3)
    margins_T = margins(scores, selected, 8)
    slope = float(load_slope(margin_counts(margins_T), 1.0))
    move = 0.1 * float(margins_T.median())
    loads = [biased_selection(kind, logits, bias + m, 3)[0][:, :8].sum(dim=1).float().mean() for m in (-move, move)]
    measured = float(loads[1] - loads[0]) / (2 * move)
    assert measured / 1.6 < slope < measured * 1.6
    assert float(gain(0.5, torch.tensor(slope), 8, 3)) == pytest.approx(0.5 * 24 / slope)


def test_the_slope_is_bounded_where_all_tokens_are_alike():
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(100, -1) * 5
    selection = select(logits, 8, 3, "none", bias_E=torch.zeros(8))
    counts = margin_counts(margins(biased_scores(logits, "softmax", torch.zeros(8)), selection.selected_TA, 8))
    unit = score_unit("softmax", 16)
    assert float(load_slope(counts, unit)) >= 0.25 / (2 * unit)
    assert float(load_slope(torch.zeros_like(counts), unit)) == 0.25 / (2 * unit)


def test_the_rate_decays_to_half_and_never_ends():
    assert decayed_rate(0.5, 0, 100) == 0.5
    assert decayed_rate(0.5, 100, 100) == 0.25
    assert 0 < decayed_rate(0.5, 100_000, 100) < 1e-3


STEPS, TOKENS, WINDOW = 200, 2048, 10
SHAPES = [(8, 8, 3, 1.2), (8, 8, 3, 1.8), (64, 64, 8, 2.5), (64, 64, 8, 6.0)]
SPREADS = [("softmax", 0.15), ("softmax", 1.0), ("softmax", 3.0), ("sigmoid", 0.15), ("sigmoid", 2.0)]


@pytest.mark.parametrize(("kind", "spread"), SPREADS)
@pytest.mark.parametrize(("num_true", "num_null", "top_k", "target"), SHAPES)
def test_a_random_router_settles_at_the_target_and_stays(kind, spread, num_true, num_null, top_k, target):
    """New tokens each step through fixed uneven scores, narrow as at the start or wide as after training.

    One step's tokens alone have a load that differs from the mean by up to 1.5 %: judged are means of ten steps.
    """
    generator = torch.Generator().manual_seed(num_true)
    columns = num_true + num_null
    offsets = 0.5 * spread * torch.randn(num_true, generator=generator).repeat(2)
    bias = torch.zeros(num_true)
    loads = []
    for step in range(STEPS):
        logits = spread * torch.randn(TOKENS, columns, generator=generator) + offsets
        selected, scores = biased_selection(kind, logits, bias, top_k)
        counts = selected[:, :num_true].sum(dim=0)
        loads.append(int(counts.sum()) / TOKENS)
        slope = load_slope(margin_counts(margins(scores, selected, num_true)), score_unit(kind, columns))
        mu = gain(decayed_rate(0.5, step, STEPS), slope, num_true, top_k)
        bias = updated_bias(bias, counts, torch.tensor(TOKENS), top_k, target, mu)
    means = torch.tensor(loads).unfold(0, WINDOW, 1).mean(dim=1) / target - 1
    off = (means.abs() > 0.02).nonzero().flatten()
    settled = int(off[-1]) + 1 + WINDOW if len(off) else WINDOW
    print(f"{kind} n={num_true} {spread=} {target=}: settled after {settled}, last 100: {means[-100:].abs().max():.2%}")
    assert abs(loads[0] / target - 1) > 0.05, "the target must be off the load that no bias gives"
    assert settled <= 100
