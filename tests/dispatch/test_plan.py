"""The plans against loops over (rank, token, expert)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adamoe_dist.dispatch import pack_bits, plan_receiving, plan_sending, unpack_bits

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
            pairs += [(rank, token)] * len(experts)
    plan = plan_sending(routing, ranks)
    assert plan.row_token_R.tolist() == [token for _, token in rows]
    assert plan.pair_token_P.tolist() == [token for _, token in pairs]
    assert plan.rows_per_rank == [sum(r == rank for r, _ in rows) for rank in range(ranks)]
    assert plan.pairs_per_rank == [sum(r == rank for r, _ in pairs) for rank in range(ranks)]
    for rank in range(ranks):
        assert torch.equal(plan.map_GTL[rank], routing[:, rank * local : (rank + 1) * local])


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
    plan = plan_receiving(maps)
    assert [rows[i] for i in plan.pair_row_P.tolist()] == [(rank, token) for rank, token, _ in expected]
    assert [pairs[i] for i in plan.pair_position_P.tolist()] == expected
    assert plan.tokens_per_expert_L.tolist() == [sum(other == e for *_, other in pairs) for e in range(local)]
    assert plan.rows_per_rank == [sum(r == rank for r, _ in rows) for rank in range(ranks)]
    assert plan.pairs_per_rank == [sum(r == rank for r, *_ in pairs) for rank in range(ranks)]


@settings(deadline=None, max_examples=100)
@given(TOKENS, RANKS, LOCAL, SEEDS, DENSITIES)
def test_what_one_rank_plans_to_send_is_what_the_other_plans_to_receive(tokens, ranks, local, seed, density):
    """Every rank's send order, cut and passed on as an all-to-all would, is the other's receive order."""
    routings = [random_map(seed + rank, density, tokens, ranks * local) for rank in range(ranks)]
    sends = [plan_sending(routing, ranks) for routing in routings]
    for here in range(ranks):
        receive = plan_receiving(torch.stack([send.map_GTL[here] for send in sends]))
        assert receive.rows_per_rank == [send.rows_per_rank[here] for send in sends]
        assert receive.pairs_per_rank == [send.pairs_per_rank[here] for send in sends]
        arrived = [
            (source, token)
            for source, send in enumerate(sends)
            for token in send.row_token_R.split(send.rows_per_rank)[here].tolist()
        ]
        experts = torch.repeat_interleave(torch.arange(local), receive.tokens_per_expert_L).tolist()
        for row, expert in zip(receive.pair_row_P.tolist(), experts, strict=True):
            source, token = arrived[row]
            assert routings[source][token, here * local + expert]


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
