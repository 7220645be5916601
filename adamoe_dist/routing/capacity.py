"""How many tokens a true expert takes at most, and which ones it keeps.

Axes: T tokens of a rank, E true experts (n).
"""

import math
from typing import Literal

import torch
from torch import Tensor

DropPolicy = Literal["probs", "position"]


def expert_capacity(tokens: int, capacity_factor: float, expected_load: float, num_true: int) -> int:
    """Tokens of one rank that a true expert takes at most: `ceil(factor * T * load / n)`, no more than T.

    Args:
        tokens: Tokens of the rank's micro-batch T, padding included. Where ranks share sequences: of its part of them.
        capacity_factor: Multiple of an expert's share at balance.
        expected_load: True experts per token at balance.
        num_true: Number of true experts n.

    Returns:
        The capacity.
    """
    share = capacity_factor * tokens * expected_load / num_true
    return min(tokens, math.ceil(share * (1.0 - 1e-12)))  # 4.000000000000001 is 4


@torch.no_grad()
def within_capacity(probs_TE: Tensor, routing_map_TE: Tensor, capacity: int, policy: DropPolicy) -> Tensor:
    """Which of the selected pairs of token and true expert stay within each expert's capacity.

    Only selected pairs take capacity, so padding takes none. Nothing depends on the order in which a kernel
    visits equal weights.

    Args:
        probs_TE: Combine weights (T, E).
        routing_map_TE: Bool (T, E), the pairs selected.
        capacity: Tokens that each expert keeps at most.
        policy: `probs` keeps the largest weights, and among equals the first tokens; `position` the first tokens.

    Returns:
        Bool (T, E), a subset of the map.
    """
    if capacity >= routing_map_TE.shape[0]:
        return routing_map_TE
    if policy == "position":
        return routing_map_TE & (routing_map_TE.cumsum(dim=0) <= capacity)
    ranked_TE = probs_TE.masked_fill(~routing_map_TE, -1.0).argsort(dim=0, descending=True, stable=True)
    first_TE = torch.zeros_like(routing_map_TE).scatter(0, ranked_TE[:capacity], True)
    return routing_map_TE & first_TE
