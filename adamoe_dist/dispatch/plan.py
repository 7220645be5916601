"""Who gets which row: index arithmetic of one MoE layer's dispatch, without communication.

Legend: T tokens of this rank, R rows, P pairs (token, true expert), G expert-parallel ranks, L local experts of a rank
(E = G x L true experts). A null slot is in no pair, hence in no row.

Orders. *Send order* of pairs is (destination rank, token, local expert); *receive order* is (source rank, token, local
expert), which is what an all-to-all makes of the senders' order; *expert order* is (local expert, source rank, token).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class SendPlan:
    """What this rank sends: which token each row or pair belongs to, and how many go to each rank."""

    row_token_R: Tensor
    rows_per_rank: list[int]
    pair_token_P: Tensor
    pairs_per_rank: list[int]
    map_GTL: Tensor


@dataclass(frozen=True)
class ReceivePlan:
    """What this rank receives, and how received rows become the experts' input."""

    rows_per_rank: list[int]
    pairs_per_rank: list[int]
    pair_row_P: Tensor
    """Expert order: the received row that each pair reads (rows in receive order)."""
    pair_position_P: Tensor
    """Expert order: the position that each pair has in receive order."""
    tokens_per_expert_L: Tensor


def plan_sending(routing_map_TE: Tensor, num_ranks: int) -> SendPlan:
    """Plan the rows and pairs that leave this rank.

    Args:
        routing_map_TE: (T, E) bool, true where a token uses a true expert; rows may be empty (all null).
        num_ranks: G, expert-parallel ranks; rank g holds experts g*L ... (g+1)*L - 1.
    """
    tokens, experts = routing_map_TE.shape
    map_GTL = routing_map_TE.reshape(tokens, num_ranks, experts // num_ranks).transpose(0, 1).contiguous()
    needed_GT = map_GTL.any(dim=-1)
    pairs_GTL = map_GTL.nonzero()
    rows_GT = needed_GT.nonzero()
    counts = torch.stack([needed_GT.sum(dim=1), map_GTL.sum(dim=(1, 2))]).tolist()
    return SendPlan(
        row_token_R=rows_GT[:, 1],
        rows_per_rank=counts[0],
        pair_token_P=pairs_GTL[:, 1],
        pairs_per_rank=counts[1],
        map_GTL=map_GTL,
    )


def plan_receiving(map_GTL: Tensor) -> ReceivePlan:
    """Plan what this rank does with the rows it receives.

    Args:
        map_GTL: (G, T, L) bool, for each source rank and token which of *this* rank's experts the token uses.
    """
    needed_GT = map_GTL.any(dim=-1)
    map_RL = map_GTL[needed_GT]
    position_RL = map_RL.flatten().cumsum(0).view_as(map_RL) - 1
    pairs_LR = map_RL.t().nonzero()
    pair_row_P = pairs_LR[:, 1]
    counts = torch.stack([needed_GT.sum(dim=1), map_GTL.sum(dim=(1, 2))]).tolist()
    return ReceivePlan(
        rows_per_rank=counts[0],
        pairs_per_rank=counts[1],
        pair_row_P=pair_row_P,
        pair_position_P=position_RL[pair_row_P, pairs_LR[:, 0]],
        tokens_per_expert_L=map_RL.sum(dim=0),
    )


def pack_bits(map_GTL: Tensor) -> Tensor:
    """Pack a bool map (..., L) into bytes (..., ceil(L / 8)), lowest expert in the lowest bit."""
    local_experts = map_GTL.shape[-1]
    size = -(-local_experts // 8) * 8
    padded = torch.nn.functional.pad(map_GTL.to(torch.uint8), (0, size - local_experts))
    return cast(Tensor, (padded.unflatten(-1, (-1, 8)) * _bit_values(map_GTL.device)).sum(-1, dtype=torch.uint8))


def unpack_bits(packed: Tensor, local_experts: int) -> Tensor:
    """Undo :func:`pack_bits`."""
    bits = packed.unsqueeze(-1).bitwise_and(_bit_values(packed.device)).ne(0)
    return bits.flatten(-2)[..., :local_experts]


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
