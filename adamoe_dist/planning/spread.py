"""How many true experts a token uses, and on how many ranks they are: expectations from the load alone.

Legend: n true experts, m null experts, k slots, x true experts of one token, G expert-parallel ranks, l = n / G.

A token fills k slots with distinct columns of n + m. Were all columns alike, x would be hypergeometric. A load other
than k n / (n + m) tilts it: each true column weighs w times a null one, so that P(x) is proportional to
C(n, x) C(m, k - x) w^x (Fisher's noncentral hypergeometric distribution, of all with that mean the one that takes
nothing else for granted), and w is what gives the load. A known share of tokens without a true expert is put in the
place of P(0), and the rest is tilted to the same load: routers that have learnt give some tokens none far more often.

Given x, the true experts are taken as x of n without preference. A rank with l of them has none of the token's with
probability C(n - l, x) / C(n, x), so a token is expected on G (1 - sum_x P(x) C(n - l, x) / C(n, x)) ranks.
"""

from functools import lru_cache
from math import comb, exp, log

from adamoe_dist.errors import UserError

_BISECTIONS = 200


@lru_cache(maxsize=4096)
def load_distribution(
    experts: int, null_experts: int, slots: int, load: float, all_null_share: float | None = None
) -> tuple[float, ...]:
    """Return P(x) for x = 0 ... min(k, n) true experts of a token.

    Args:
        experts: n.
        null_experts: m.
        slots: k.
        load: mean of x.
        all_null_share: P(0), where it is known.

    Raises:
        UserError: no token can have so many, or the share does not leave room for the load.
    """
    low, high = max(0, slots - null_experts), min(slots, experts)
    if not low <= load <= high:
        raise UserError(
            f"--load {load:g}: with moe.num_experts={experts}, moe.num_null_experts={null_experts}, moe.top_k={slots} "
            f"a token uses {low} to {high} true experts; give a load in that range"
        )
    if all_null_share is None:
        return _tilted(experts, null_experts, slots, load, low, high)
    first, rest = max(1, low), 1.0 - all_null_share
    if not 0 <= all_null_share < 1 or (low > 0 and all_null_share > 0) or not first * rest <= load <= high * rest:
        raise UserError(
            f"--all-null-share {all_null_share:g} does not go with a load of {load:g}: the other tokens use {first} to "
            f"{high} true experts each; change one of them"
        )
    others = _tilted(experts, null_experts, slots, load / rest, first, high)
    return (all_null_share, *(rest * share for share in others[1:]))


def _tilted(experts: int, null_experts: int, slots: int, mean: float, low: int, high: int) -> tuple[float, ...]:
    """Return the tilted distribution on low ... high with the given mean."""
    if mean <= low or mean >= high:
        edge = low if mean <= low else high
        return tuple(float(x == edge) for x in range(high + 1))
    logs = {x: log(comb(experts, x)) + log(comb(null_experts, slots - x)) for x in range(low, high + 1)}

    def shares(tilt: float) -> tuple[float, ...]:
        terms = {x: value + x * tilt for x, value in logs.items()}
        top = max(terms.values())
        weights = [exp(terms[x] - top) if x in terms else 0.0 for x in range(high + 1)]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    lower, upper = -200.0, 200.0
    for _ in range(_BISECTIONS):
        middle = (lower + upper) / 2
        if sum(x * share for x, share in enumerate(shares(middle))) < mean:
            lower = middle
        else:
            upper = middle
    return shares((lower + upper) / 2)


def chance_of_a_rank(experts: int, ranks: int, distribution: tuple[float, ...]) -> float:
    """Return the part of the tokens that use at least one of a given rank's n / G true experts."""
    local = experts // ranks
    missed = sum(share * comb(experts - local, x) / comb(experts, x) for x, share in enumerate(distribution) if share)
    return 1.0 - missed


def mean_load(distribution: tuple[float, ...]) -> float:
    """Return the mean of x."""
    return sum(x * share for x, share in enumerate(distribution))
