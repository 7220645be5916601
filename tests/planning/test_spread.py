"""Expected loads and ranks of a token against enumeration, and against the project's own selection."""

import itertools
from math import comb

import pytest
import torch

from adamoe_dist.dispatch.plan import count_packed, pack_by_rank
from adamoe_dist.errors import UserError
from adamoe_dist.planning import chance_of_a_rank, load_distribution, mean_load
from adamoe_dist.routing import select


def test_at_balance_the_load_is_hypergeometric() -> None:
    """Counted: of all choices of 3 of 4 true and 5 null columns, those with x true ones."""
    found = load_distribution(4, 5, 3, 3 * 4 / 9)
    choices = list(itertools.combinations(range(9), 3))
    for x, share in enumerate(found):
        assert share == pytest.approx(sum(sum(c < 4 for c in choice) == x for choice in choices) / len(choices))


@pytest.mark.parametrize(
    ("experts", "nulls", "slots", "load"),
    [(8, 8, 3, 0.2), (8, 8, 3, 2.9), (64, 192, 4, 1.7), (4, 2, 5, 3.4), (256, 256, 16, 5.0), (8, 0, 2, 2.0)],
)
def test_the_load_is_met(experts: int, nulls: int, slots: int, load: float) -> None:
    shares = load_distribution(experts, nulls, slots, load)
    assert sum(shares) == pytest.approx(1.0) and mean_load(shares) == pytest.approx(load)
    assert all(share == 0 for share in shares[: max(0, slots - nulls)])


def test_a_known_share_without_experts_keeps_the_load() -> None:
    shares = load_distribution(8, 8, 3, 1.55, 0.19)
    assert shares[0] == 0.19 and sum(shares) == pytest.approx(1.0) and mean_load(shares) == pytest.approx(1.55)


@pytest.mark.parametrize(("load", "share"), [(3.5, None), (-0.1, None), (2.9, 0.2), (0.5, 0.2), (1.5, 1.0)])
def test_an_impossible_load_is_refused(load: float, share: float | None) -> None:
    with pytest.raises(UserError, match="load"):
        load_distribution(8, 8, 3, load, share)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_chance_of_a_rank_is_the_share_of_all_choices(ranks: int) -> None:
    """Enumerated: 4 of 6 true and 5 null columns, all choices alike; the first 6 / ranks experts are the rank's."""
    choices = list(itertools.combinations(range(11), 4))
    used = sum(any(column < 6 // ranks for column in choice) for choice in choices) / len(choices)
    shares = load_distribution(6, 5, 4, 4 * 6 / 11)
    assert chance_of_a_rank(6, ranks, shares) == pytest.approx(used)
    assert sum(comb(6, x) * comb(5, 4 - x) for x in range(5)) == len(choices)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("experts", "nulls", "slots", "preference"), [(8, 8, 3, 0.0), (8, 8, 3, 0.8), (64, 64, 8, -0.7), (64, 192, 4, 0.0)]
)
def test_rows_of_the_real_selection(ranks: int, experts: int, nulls: int, slots: int, preference: float) -> None:
    """Random scores with a preference for true experts: rows by the bits that would travel, at the load that arose."""
    logits_TA = torch.randn(20000, experts + nulls, generator=torch.Generator().manual_seed(3))
    logits_TA[:, :experts] += preference
    routing_TE = select(logits_TA, experts, slots, "true_experts").selected_TA[:, :experts]
    rows, pairs, _ = count_packed(pack_by_rank(routing_TE, ranks)).double().mean(dim=1).tolist()
    load = routing_TE.sum(dim=1).double().mean().item()
    assert rows / 20000 == pytest.approx(
        chance_of_a_rank(experts, ranks, load_distribution(experts, nulls, slots, load)), rel=0.02
    )
    assert pairs / 20000 == pytest.approx(load / ranks)


def test_rows_that_were_measured_with_the_dispatcher() -> None:
    """docs/results.md, "Rows and bytes": untrained routers, rows a token to other ranks at the load seen.

    Each is one draw of a router that sends 1 % more or fewer pairs to other ranks than an even one.
    """
    for ranks, experts, nulls, slots, load, rows in (
        (2, 8, 8, 3, 1.55, 0.618), (2, 8, 24, 4, 1.05, 0.447), (2, 64, 64, 3, 1.48, 0.560), (2, 64, 64, 8, 3.96, 0.901),
        (4, 8, 8, 3, 1.54, 1.079), (4, 8, 24, 4, 1.06, 0.752), (4, 64, 64, 3, 1.48, 0.987), (4, 64, 64, 8, 3.97, 1.990),
    ):  # fmt: skip
        shares = load_distribution(experts, nulls, slots, load)
        assert (ranks - 1) * chance_of_a_rank(experts, ranks, shares) == pytest.approx(rows, rel=0.03)
