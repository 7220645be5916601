"""Capacity: its size, which tokens stay, and that the order is defined."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamoe_dist.routing import expert_capacity, select, within_capacity
from tests.routing.examples import distinct_logits, some_padding


@given(
    tokens=st.integers(0, 5000),
    hundredths=st.integers(1, 400),
    n=st.integers(1, 128),
    m=st.integers(0, 128),
    k=st.integers(1, 16),
)
def test_capacity_is_the_rounded_up_share_at_balance(tokens, hundredths, n, m, k):
    """Against exact fractions: a float's last bit must not add a token."""
    share = Fraction(hundredths, 100) * tokens * Fraction(k * n, n + m) / n
    assert expert_capacity(tokens, hundredths / 100, k * n / (n + m), n) == min(tokens, math.ceil(share))


def kept_by_hand(weights, chosen, capacity, policy):
    kept = torch.zeros_like(chosen)
    for expert in range(chosen.shape[1]):
        tokens = [token for token in range(len(chosen)) if chosen[token, expert]]
        if policy == "probs":
            tokens.sort(key=lambda token: (-weights[token, expert].item(), token))
        for token in tokens[:capacity]:
            kept[token, expert] = True
    return kept


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [0, 1, 3, 8, 39, 40, 100])
def test_the_pairs_kept_are_those_counted_by_hand(policy, capacity):
    for logits in (distinct_logits(40, 12, seed=0), distinct_logits(40, 12, seed=0).div(0.4).round()):
        selection = select(logits.float(), 8, 3, "true_experts", some_padding(40, seed=1))
        kept = within_capacity(selection.probs_TE, selection.routing_map_TE, capacity, policy)
        assert torch.equal(kept, kept_by_hand(selection.probs_TE, selection.routing_map_TE, capacity, policy))


def test_equal_weights_are_kept_in_the_order_of_tokens():
    chosen = torch.ones(100, 3, dtype=torch.bool)
    chosen[::2, 1] = False
    kept = within_capacity(torch.full((100, 3), 0.5), chosen, 10, "probs")
    assert torch.equal(kept, within_capacity(torch.full((100, 3), 0.5), chosen, 10, "position"))
    assert kept[:10, 0].all() and kept[:, 0].sum() == 10 and kept[:20, 1].sum() == 10


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_padding_takes_no_capacity(policy):
    logits = distinct_logits(40, 12, seed=5)
    padding = some_padding(40, seed=1)
    with_padding = select(logits, 8, 3, "true_experts", padding)
    alone = select(logits[~padding], 8, 3, "true_experts")
    kept = within_capacity(with_padding.probs_TE, with_padding.routing_map_TE, 4, policy)
    assert not kept[padding].any()
    assert torch.equal(kept[~padding], within_capacity(alone.probs_TE, alone.routing_map_TE, 4, policy))


def test_by_weight_it_is_megatrons_rule():
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    selection = select(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), 8, 2, "none")
    probs, kept = apply_router_token_dropping(selection.probs_TE, selection.routing_map_TE, 2, 0.75, "probs")
    capacity = expert_capacity(64, 0.75, 2.0, 8)
    ours = within_capacity(selection.probs_TE, selection.routing_map_TE, capacity, "probs")
    assert torch.equal(ours, kept) and not torch.equal(ours, selection.routing_map_TE)
    assert torch.equal(selection.probs_TE.masked_fill(~ours, 0.0), probs)
