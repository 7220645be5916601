"""The plans against loops over (rank, token, expert)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamoe_dist.dispatch.padded import tokens_of_places
from adamoe_dist.dispatch.plan import (
    pack_bits,
    pack_by_rank,
    packed_sizes,
    plan_locally,
    plan_receiving,
    plan_sending,
    unpack_bits,
)

TOKENS, RANKS, LOCAL = st.integers(0, 9), st.integers(1, 4), st.integers(1, 11)
SEEDS, DENSITIES = st.integers(0, 2**16), st.sampled_from([0.0, 0.1, 0.5, 1.0])


def random_map(seed, density, *shape):
    """A map with whole ranks and whole tokens left out at random, besides its density."""
    generator = torch.Generator().manual_seed(seed)
    mapping = torch.rand(*shape, generator=generator) < density
    for axis in range(mapping.ndim):
        kept = torch.rand(mapping.shape[axis], generator=generator) < 0.8
        mapping &= kept.view([-1 if other == axis else 1 for other in range(mapping.ndim)])
    return mapping


@settings(deadline=None, max_examples=150)
@given(TOKENS, RANKS, LOCAL, SEEDS, DENSITIES)
def test_sending_lists_each_row_and_pair_in_send_order(tokens, ranks, local, seed, density):
    routing = random_map(seed, density, tokens, ranks * local)
    rows, pairs = [], []
    for rank in range(ranks):
        for token in range(tokens):
            experts = [e for e in range(rank * local, (rank + 1) * local) if routing[token, e]]
            rows += [(rank, token)] if experts else []
            pairs += [(rank, token, e) for e in experts]
    packed = pack_by_rank(routing, ranks)
    (sizes,) = packed_sizes(packed)
    plan = plan_sending(packed, local, sizes)
    assert plan.row_token_R.tolist() == [token for _, token in rows]
    assert plan.pair_token_P.tolist() == [token for _, token, _ in pairs]
    assert plan.pair_weight_P.tolist() == [token * ranks * local + e for _, token, e in pairs]
    assert sizes.rows_per_rank == [sum(r == rank for r, _ in rows) for rank in range(ranks)]
    assert sizes.pairs_per_rank == [sum(r == rank for r, *_ in pairs) for rank in range(ranks)]
    for rank in range(ranks):
        assert torch.equal(unpack_bits(packed[rank], local), routing[:, rank * local : (rank + 1) * local])


@settings(deadline=None, max_examples=150)
@given(TOKENS, RANKS, LOCAL, SEEDS, DENSITIES)
def test_receiving_sorts_pairs_by_expert_and_finds_their_rows(tokens, ranks, local, seed, density):
    maps = random_map(seed, density, ranks, tokens, local)
    rows, pairs = [], []
    for rank in range(ranks):
        for token in range(tokens):
            experts = [e for e in range(local) if maps[rank, token, e]]
            rows += [(rank, token)] if experts else []
            pairs += [(rank, token, e) for e in experts]
    expected = [(rank, token, e) for e in range(local) for rank, token, other in pairs if other == e]
    packed = pack_bits(maps)
    (sizes,) = packed_sizes(packed)
    plan = plan_receiving(packed, local, sizes)
    assert [rows[i] for i in plan.pair_row_P.tolist()] == [(rank, token) for rank, token, _ in expected]
    assert [pairs[i] for i in plan.pair_position_P.tolist()] == expected
    assert plan.tokens_per_expert_L.tolist() == [sum(other == e for *_, other in pairs) for e in range(local)]
    assert sizes.rows_per_rank == [sum(r == rank for r, _ in rows) for rank in range(ranks)]
    assert sizes.pairs_per_rank == [sum(r == rank for r, *_ in pairs) for rank in range(ranks)]


@settings(deadline=None, max_examples=100)
@given(TOKENS, LOCAL, SEEDS, DENSITIES)
def test_local_plans_sort_pairs_by_expert(tokens, experts, seed, density):
    routing = random_map(seed, density, tokens, experts)
    pairs = [(token, e) for e in range(experts) for token in range(tokens) if routing[token, e]]
    packed = pack_bits(routing)
    (sizes,) = packed_sizes(packed.unsqueeze(0))
    plan = plan_locally(packed, experts, sizes)
    assert plan.pair_token_P.tolist() == [token for token, _ in pairs]
    assert plan.pair_weight_P.tolist() == [token * experts + e for token, e in pairs]
    assert plan.tokens_per_expert_L.tolist() == routing.sum(dim=0).tolist()


@settings(deadline=None, max_examples=100)
@given(TOKENS, RANKS, LOCAL, SEEDS, DENSITIES)
def test_what_one_rank_plans_to_send_is_what_the_other_plans_to_receive(tokens, ranks, local, seed, density):
    """Every rank's send order, cut and passed on as an all-to-all would, is the other's receive order."""
    routings = [random_map(seed + rank, density, tokens, ranks * local) for rank in range(ranks)]
    outgoing = [pack_by_rank(routing, ranks) for routing in routings]
    sent = packed_sizes(*outgoing)
    sends = [plan_sending(packed, local, sizes) for packed, sizes in zip(outgoing, sent, strict=True)]
    for here in range(ranks):
        incoming = torch.stack([packed[here] for packed in outgoing])
        (received,) = packed_sizes(incoming)
        receive = plan_receiving(incoming, local, received)
        assert received.rows_per_rank == [sizes.rows_per_rank[here] for sizes in sent]
        assert received.pairs_per_rank == [sizes.pairs_per_rank[here] for sizes in sent]
        arrived = [
            (source, token)
            for source, (send, sizes) in enumerate(zip(sends, sent, strict=True))
            for token in send.row_token_R.split(sizes.rows_per_rank)[here].tolist()
        ]
        experts = torch.repeat_interleave(torch.arange(local), receive.tokens_per_expert_L).tolist()
        for row, expert in zip(receive.pair_row_P.tolist(), experts, strict=True):
            source, token = arrived[row]
            assert routings[source][token, here * local + expert]


@settings(deadline=None, max_examples=100)
@given(TOKENS, LOCAL, SEEDS, DENSITIES, st.integers(0, 5))
def test_places_hold_the_first_tokens_of_each_expert(tokens, experts, seed, density, capacity):
    routing = random_map(seed, density, tokens, experts)
    expected = []
    for expert in range(experts):
        kept = [token for token in range(tokens) if routing[token, expert]][:capacity]
        expected += kept + [tokens] * (capacity - len(kept))
    assert tokens_of_places(routing, capacity).tolist() == expected


@settings(deadline=None, max_examples=150)
@given(TOKENS, RANKS, st.integers(1, 20), SEEDS, DENSITIES)
def test_packed_bits_are_the_binary_numbers_of_the_maps(tokens, ranks, local, seed, density):
    maps = random_map(seed, density, ranks, tokens, local)
    packed = pack_bits(maps)
    assert packed.dtype == torch.uint8 and packed.shape == (ranks, tokens, (local + 7) // 8)
    for rank in range(ranks):
        for token in range(tokens):
            number = sum(2**expert for expert in range(local) if maps[rank, token, expert])
            assert bytes(packed[rank, token].tolist()) == number.to_bytes((local + 7) // 8, "little")
    assert torch.equal(unpack_bits(packed, local), maps)
