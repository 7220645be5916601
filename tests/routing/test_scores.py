"""Sigmoid scores, selection bias and null experts that have an output, against the plain-Python reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamoe_dist.routing import select
from tests.routing import reference
from tests.routing.examples import distinct_logits, some_padding

MODES = ("true_experts", "all_selected", "none")
FUNCTIONS = ("softmax", "sigmoid")


def bias_of(num_true, seed=0):
    return 0.3 * torch.randn(num_true, generator=torch.Generator().manual_seed(seed))


def both_weights(logits, num_true, k, mode, padding, function, bias, with_output):
    """Weights of all columns by `select`, zero experts' columns filled with the zeros that they have."""
    chosen = select(
        logits,
        num_true,
        k,
        mode,
        padding,
        score_function=function,
        bias_E=bias,
        num_with_output=with_output,
    )
    zeros = torch.zeros(len(logits), logits.shape[1] - num_true - with_output, dtype=logits.dtype)
    return chosen, torch.cat((chosen.probs_TE, zeros, chosen.null_probs_TW), dim=1)


def reference_weights(rows, num_true, k, mode, pads, function, bias, with_output):
    listed = None if bias is None else bias.double().tolist()
    return [
        [0.0] * len(row) if pad else reference.column_weights(row, num_true, k, mode, function, listed, with_output)
        for row, pad in zip(rows, pads, strict=True)
    ]


def check(logits, num_true, k, mode, padding, function, bias, with_output):
    pads = padding.tolist()
    arguments = (num_true, k, mode, pads, function, bias, with_output)
    leaf = logits.clone().requires_grad_()
    chosen, weights = both_weights(leaf, num_true, k, mode, padding, function, bias, with_output)
    expected = torch.tensor(reference_weights(logits.tolist(), *arguments), dtype=torch.float64)
    torch.testing.assert_close(weights, expected.reshape(weights.shape), rtol=1e-12, atol=1e-15)
    listed = None if bias is None else bias.double().tolist()
    for token, row in enumerate(logits.tolist()):
        columns = [] if pads[token] else reference.selection(row, num_true, k, function, listed)
        assert chosen.selected_TA[token].nonzero().flatten().tolist() == sorted(columns)
    cotangent = torch.randn(weights.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (weights * cotangent).sum().backward()

    def task_loss(rows):
        table = reference_weights(rows, *arguments)
        return sum(g * w for gs, ws in zip(cotangent.tolist(), table, strict=True) for g, w in zip(gs, ws, strict=True))

    gradient = torch.tensor(reference.gradient(task_loss, logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, gradient.reshape(leaf.shape), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("mode", "function"), itertools.product(MODES, FUNCTIONS))
@pytest.mark.parametrize(("num_null", "with_output"), [(0, 0), (4, 0), (4, 2), (4, 4)])
def test_weights_and_gradients_equal_the_reference(mode, function, num_null, with_output):
    padding = torch.tensor([False, True, False, False])
    for k, bias in itertools.product((1, 3, 5 + num_null), (None, bias_of(5))):
        check(distinct_logits(4, 5 + num_null, seed=k), 5, k, mode, padding, function, bias, with_output)


@settings(max_examples=40, deadline=None)
@given(
    num_true=st.integers(1, 7),
    num_null=st.integers(0, 6),
    mode=st.sampled_from(MODES),
    function=st.sampled_from(FUNCTIONS),
    seed=st.integers(0, 10_000),
    biased=st.booleans(),
    data=st.data(),
)
def test_any_shape_equals_the_reference(num_true, num_null, mode, function, seed, biased, data):
    k = data.draw(st.integers(1, num_true + num_null))
    with_output = data.draw(st.integers(0, num_null))
    logits = distinct_logits(3, num_true + num_null, seed)
    check(
        logits,
        num_true,
        k,
        mode,
        some_padding(3, seed),
        function,
        bias_of(num_true, seed) if biased else None,
        with_output,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bias_moves_the_selection_only_and_has_no_gradient(function):
    logits = distinct_logits(64, 12, seed=1).float()
    bias = torch.zeros(8).requires_grad_()
    plain = select(logits, 8, 3, "none", score_function=function)
    zero = select(logits, 8, 3, "none", score_function=function, bias_E=bias)
    assert torch.equal(plain.probs_TE, zero.probs_TE) and torch.equal(plain.selected_TA, zero.selected_TA)
    everywhere = select(logits.requires_grad_(), 8, 3, "true_experts", score_function=function, bias_E=bias + 10.0)
    assert everywhere.routing_map_TE.sum(dim=1).eq(3).all()
    torch.testing.assert_close(everywhere.probs_TE.sum(dim=1), torch.ones(64))
    everywhere.probs_TE.square().sum().backward()
    assert bias.grad is None
    nowhere = select(logits, 8, 3, "true_experts", score_function=function, bias_E=bias - 10.0)
    assert not nowhere.routing_map_TE.any()


def test_a_bias_ranks_softmax_scores_whatever_the_normalisation():
    """LongCat: top-k of R(x) + b with R the softmax over all; logits plus b would choose otherwise."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.5])
    for mode in MODES:
        assert select(logits, 3, 1, mode, bias_E=bias).top_indices_TK.tolist() == [[0]]
        assert select(logits, 3, 2, mode, bias_E=bias).top_indices_TK.tolist() == [[0, 2]]
        assert select(logits, 3, 1, mode, bias_E=bias + torch.tensor([0.0, 0.0, 0.2])).top_indices_TK.tolist() == [[2]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [30.0, 100.0, 1000.0])
def test_vanishing_sigmoid_scores_give_no_nan(mode, dtype, depth):
    leaf = torch.full((3, 8), -depth, dtype=dtype)
    leaf[0, 5:] = depth
    leaf[1, 0] = depth
    leaf.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        chosen = select(leaf, 5, 3, mode, torch.tensor([False, False, True]), score_function="sigmoid")
        chosen.probs_TE.square().sum().backward()
    assert chosen.probs_TE.isfinite().all() and leaf.grad.isfinite().all()
    assert chosen.probs_TE[0].eq(0).all() and chosen.probs_TE[2].eq(0).all() and leaf.grad[2].eq(0).all()
    assert chosen.probs_TE[1, 0] > 0.3


def test_experts_with_an_output_share_the_weight_of_a_token():
    logits = distinct_logits(200, 12, seed=3)
    chosen = select(logits, 6, 4, "true_experts", num_with_output=3)
    total = chosen.probs_TE.sum(dim=1) + chosen.null_probs_TW.sum(dim=1)
    works = chosen.routing_map_TE.any(dim=1) | chosen.null_map_TN[:, 3:].any(dim=1)
    torch.testing.assert_close(total, works.double())
    assert (chosen.null_probs_TW > 0).any(dim=0).all()
    assert torch.equal(chosen.null_probs_TW > 0, chosen.null_map_TN[:, 3:])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_stay_in_their_token(function, mode, value):
    logits = distinct_logits(6, 12, seed=2).float()
    clean = select(logits, 8, 3, mode, score_function=function)
    logits[2, 1] = value
    logits[4] = value
    for bias in (None, torch.zeros(8)):
        chosen = select(logits, 8, 3, mode, score_function=function, bias_E=bias)
        fine = torch.tensor([0, 1, 3, 5])
        assert torch.equal(chosen.probs_TE[fine], clean.probs_TE[fine])
        assert chosen.selected_TA.sum(dim=1).eq(3).all()


def test_more_experts_with_output_than_null_experts_are_refused():
    with pytest.raises(AssertionError, match="3 of 2 null experts"):
        select(torch.zeros(2, 6), 4, 2, "none", num_with_output=3)
