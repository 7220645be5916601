"""Without null experts and ties the selection is Megatron's, bit for bit; the balance loss is k times Megatron's."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)

from adamoe_dist.routing import balance_loss, select, z_loss

SHAPES = [(4, 1), (4, 2), (8, 2), (8, 8), (64, 6), (128, 8)]


def logits_of(kind: str, experts: int) -> torch.Tensor:
    logits = torch.randn(257, experts, generator=torch.Generator().manual_seed(experts))
    if kind == "tied":
        return logits.mul(2).round().div(2)
    return logits * {"ordinary": 1.0, "underflowing": 100.0, "nearly_equal": 1e-6}[kind]


@pytest.mark.parametrize("kind", ["ordinary", "tied", "underflowing", "nearly_equal"])
@pytest.mark.parametrize(("experts", "k"), SHAPES)
@pytest.mark.parametrize(("mode", "pre_softmax"), [("true_experts", False), ("all_selected", False), ("none", True)])
def test_selection_without_null_experts_is_megatrons_bit_for_bit(mode, pre_softmax, experts, k, kind):
    ours = logits_of(kind, experts).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    selection = select(ours, experts, k, mode)
    probs, routing_map = topk_routing_with_score_function(theirs, k, use_pre_softmax=pre_softmax)
    assert_equal_where_nothing_ties(selection, ours, probs, routing_map, theirs, pre_softmax)


@pytest.mark.parametrize(("experts", "k"), SHAPES)
@pytest.mark.parametrize("mode", ["true_experts", "none"])
def test_sigmoid_weights_are_megatrons_bit_for_bit(mode, experts, k):
    """Megatron normalises for k > 1 only, so that each of our modes has its counterpart."""
    if (mode == "none") != (k == 1):
        return
    ours = logits_of("ordinary", experts).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    selection = select(ours, experts, k, mode, score_function="sigmoid")
    probs, routing_map = topk_routing_with_score_function(theirs, k, score_function="sigmoid")
    assert_equal_where_nothing_ties(selection, ours, probs, routing_map, theirs, False)


@pytest.mark.parametrize(("experts", "k"), SHAPES)
def test_the_selection_with_a_bias_is_megatrons(experts, k):
    logits = logits_of("ordinary", experts)
    bias = 0.2 * torch.randn(experts, generator=torch.Generator().manual_seed(2))
    mode = "true_experts" if k > 1 else "none"
    selection = select(logits, experts, k, mode, score_function="sigmoid", bias_E=bias)
    probs, routing_map = topk_routing_with_score_function(logits, k, score_function="sigmoid", expert_bias=bias)
    assert torch.equal(selection.routing_map_TE, routing_map)
    assert torch.equal(selection.probs_TE, probs)
    if k < experts:
        unbiased = select(logits, experts, k, mode, score_function="sigmoid").routing_map_TE
        assert not torch.equal(unbiased, routing_map)


def assert_equal_where_nothing_ties(selection, ours, probs, routing_map, theirs, pre_softmax):
    """Tied rows have the same weights at perhaps other columns: Megatron leaves those to the kernel."""
    scores = theirs.detach().softmax(dim=1) if pre_softmax else theirs.detach()
    ordered = scores.sort(dim=1).values
    free = (ordered[:, 1:] > ordered[:, :-1]).all(dim=1)
    assert selection.probs_TE.dtype == torch.float32
    assert torch.equal(selection.probs_TE[free], probs[free])
    assert torch.equal(selection.routing_map_TE[free], routing_map[free])
    assert torch.equal(selection.probs_TE.sort(dim=1).values, probs.sort(dim=1).values)
    cotangent = torch.randn(probs.shape, generator=torch.Generator().manual_seed(1))
    selection.probs_TE.backward(cotangent)
    probs.backward(cotangent)
    assert torch.equal(ours.grad[free], theirs.grad[free])


@pytest.mark.parametrize(("experts", "k"), SHAPES)
def test_balance_loss_without_null_experts_is_k_times_megatrons(experts, k):
    logits = logits_of("ordinary", experts).double()
    selection = select(logits, experts, k, "true_experts")
    theirs = switch_load_balancing_loss_func(
        probs=logits.softmax(dim=-1),
        tokens_per_expert=selection.routing_map_TE.sum(dim=0),
        total_num_tokens=257,
        topk=k,
        num_experts=experts,
        moe_aux_loss_coeff=1.0,
    )
    for kind in ("null_averaged", "switch"):
        torch.testing.assert_close(balance_loss(logits, selection, kind), k * theirs)


def test_z_loss_is_megatrons():
    logits = logits_of("ordinary", 8)
    padding = torch.arange(257) % 3 == 0
    torch.testing.assert_close(z_loss(logits), z_loss_func(logits, 1.0))
    torch.testing.assert_close(z_loss(logits, padding), z_loss_func(logits, 1.0, padding))
