"""Selection against the plain-Python reference, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamoe_dist.routing import select
from tests.routing import reference
from tests.routing.examples import distinct_logits, some_padding

MODES = ("true_experts", "all_selected", "all_true", "none")


def check_forward(logits, num_true, k, mode, padding):
    selection = select(logits, num_true, k, mode, padding)
    pads = [False] * len(logits) if padding is None else padding.tolist()
    rows = logits.tolist()
    expected = torch.tensor(reference.all_weights(rows, num_true, k, mode, pads), dtype=torch.float64)
    torch.testing.assert_close(selection.probs_TE, expected.reshape(len(rows), num_true), rtol=1e-12, atol=0)
    for token, row in enumerate(rows):
        chosen = [] if pads[token] else reference.top_k(row, k)
        assert selection.selected_TA[token].nonzero().flatten().tolist() == sorted(chosen)
        assert selection.top_indices_TK[token].tolist() == chosen or pads[token]
    assert torch.equal(selection.routing_map_TE, selection.probs_TE > 0)
    assert selection.null_map_TN.shape[1] == logits.shape[1] - num_true


def check_gradient(logits, num_true, k, mode, padding):
    pads = [False] * len(logits) if padding is None else padding.tolist()
    cotangent = torch.randn(len(logits), num_true, generator=torch.Generator().manual_seed(5)).double()
    leaf = logits.clone().requires_grad_()
    (select(leaf, num_true, k, mode, padding).probs_TE * cotangent).sum().backward()

    def task_loss(rows):
        table = reference.all_weights(rows, num_true, k, mode, pads)
        return sum(g * w for gs, ws in zip(cotangent.tolist(), table, strict=True) for g, w in zip(gs, ws, strict=True))

    expected = torch.tensor(reference.gradient(task_loss, logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_null", [0, 1, 8, 16])
def test_weights_equal_the_reference_for_every_k(num_null, mode):
    for k in range(1, 8 + num_null + 1):
        logits = distinct_logits(6, 8 + num_null, seed=k)
        check_forward(logits, 8, k, mode, None)
        check_forward(logits, 8, k, mode, some_padding(6, seed=k))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_null", "k"), [(0, 1), (0, 2), (0, 8), (1, 3), (8, 1), (8, 3), (8, 16), (16, 4)])
def test_gradient_equals_the_reference(num_null, k, mode):
    logits = distinct_logits(3, 8 + num_null, seed=num_null + k)
    check_gradient(logits, 8, k, mode, None)
    check_gradient(logits, 8, k, mode, torch.tensor([False, True, False]))


@settings(max_examples=60, deadline=None)
@given(
    num_true=st.integers(1, 9),
    num_null=st.integers(0, 12),
    tokens=st.integers(0, 5),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 10_000),
    padded=st.booleans(),
    data=st.data(),
)
def test_any_shape_equals_the_reference(num_true, num_null, tokens, mode, seed, padded, data):
    k = data.draw(st.integers(1, num_true + num_null))
    logits = distinct_logits(tokens, num_true + num_null, seed)
    check_forward(logits, num_true, k, mode, some_padding(tokens, seed) if padded else None)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    logits = distinct_logits(4, 10, seed=3).requires_grad_()
    padding = torch.tensor([False, False, True, False])
    assert torch.autograd.gradcheck(lambda x: select(x, 5, 4, mode, padding).probs_TE, logits, check_grad_dtypes=True)


def test_the_layer_output_is_the_weighted_sum_of_expert_outputs():
    logits = distinct_logits(5, 12, seed=1)
    outputs_TEH = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = torch.einsum("te,teh->th", select(logits, 6, 4, "true_experts").probs_TE, outputs_TEH)
    for token, row in enumerate(logits.tolist()):
        weights = reference.weights(row, 6, 4, "true_experts")
        expected = reference.combine(weights, outputs_TEH[token].tolist())
        torch.testing.assert_close(actual[token], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_null_experts_only_has_zero_weights_and_finite_gradients(mode, dtype):
    logits = torch.full((3, 12), -30.0, dtype=dtype)
    logits[0, 8:] = 30.0
    logits[1, 2] = 31.0
    logits[1, 8:] = 30.0
    logits[2, :8] = -20.0
    leaf = (logits + 0.01 * torch.arange(12)).requires_grad_()
    selection = select(leaf, 8, 4, mode)
    with torch.autograd.set_detect_anomaly(True):
        select(leaf, 8, 4, mode).probs_TE.square().sum().backward()
    assert selection.routing_map_TE.sum(dim=1).tolist() == [0, 1, 4]
    assert selection.probs_TE[0].eq(0).all()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad[0].eq(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_padding_goes_nowhere_and_has_no_gradient_even_if_its_logits_are_nan(mode):
    logits = distinct_logits(6, 12, seed=2)
    padding = torch.tensor([False, True, False, False, True, False])
    logits[4] = float("nan")
    leaf = logits.requires_grad_()
    selection = select(leaf, 8, 3, mode, padding)
    alone = select(logits[~padding], 8, 3, mode)
    assert torch.equal(selection.probs_TE[~padding], alone.probs_TE)
    assert torch.equal(selection.selected_TA[~padding], alone.selected_TA)
    assert not selection.selected_TA[padding].any()
    assert selection.probs_TE[padding].eq(0).all()
    selection.probs_TE.square().sum().backward()
    assert leaf.grad[padding].eq(0).all()
    assert leaf.grad[~padding].isfinite().all()


def test_weights_sum_to_one_where_a_token_has_a_true_expert():
    selection = select(distinct_logits(64, 24, seed=4), 8, 4, "true_experts")
    used = selection.routing_map_TE.any(dim=1)
    assert used.any() and not used.all()
    torch.testing.assert_close(selection.probs_TE.sum(dim=1), used.double())


def test_null_experts_take_no_share_of_all_true_weights():
    """What null experts do not displace keeps the weight it has in the model without them, and no null row learns."""
    logits = distinct_logits(64, 24, seed=4).float()
    leaf = logits.clone().requires_grad_()
    mixed, alone = select(leaf, 8, 4, "all_true"), select(logits[:, :8], 8, 4, "none")
    kept_TE = mixed.routing_map_TE & alone.routing_map_TE
    assert kept_TE.any() and not torch.equal(mixed.routing_map_TE, alone.routing_map_TE)
    assert torch.equal(mixed.probs_TE[kept_TE], alone.probs_TE[kept_TE])
    mixed.probs_TE.square().sum().backward()
    assert leaf.grad[:, 8:].eq(0).all() and leaf.grad[:, :8].count_nonzero()


def test_all_true_without_null_experts_is_none_to_the_bit():
    logits = (distinct_logits(64, 8, seed=9) * 30).float()
    results = []
    for mode in ("all_true", "none"):
        leaf = logits.clone().requires_grad_()
        selection = select(leaf, 8, 3, mode)
        selection.probs_TE.square().sum().backward()
        results.append((selection.probs_TE, selection.top_indices_TK, leaf.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_nothing_of_size_tokens_times_slots_times_experts_is_allocated():
    logits = torch.randn(64, 48, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        select(logits, 32, 6, "true_experts", torch.zeros(64, dtype=torch.bool))
    assert max(sizes) <= 64 * 48


def test_impossible_shapes_and_low_precision_are_refused():
    with pytest.raises(AssertionError, match="top_k 5 of 4"):
        select(torch.zeros(2, 4), 2, 5, "none")
    with pytest.raises(AssertionError, match="5 true experts of 4"):
        select(torch.zeros(2, 4), 5, 2, "none")
    with pytest.raises(AssertionError, match="sigmoid"):
        select(torch.zeros(2, 4), 2, 2, "all_true", score_function="sigmoid")
    with pytest.raises(AssertionError, match="bfloat16"):
        select(torch.zeros(2, 4, dtype=torch.bfloat16), 2, 2, "none")
