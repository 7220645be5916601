"""Who gets which row: index arithmetic of one MoE layer's dispatch, without communication.

Legend: T tokens of this rank, R rows, P pairs (token, true expert), G expert-parallel ranks, L local experts of a rank
(E = G x L true experts), B = ceil(L / 8) bytes of packed bits. A null slot is in no pair, hence in no row.

Orders. *Send order* of pairs is (destination rank, token, local expert); *receive order* is (source rank, token, local
expert), which is what an all-to-all makes of the senders' order; *expert order* is (local expert, source rank, token).

Plans are made from packed bits, the same bytes that travel. Nothing here waits for the device: what exists is counted
in one small tensor (:func:`count_packed`), which the caller copies to the host once, and lists are made to that size.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from adamoe_dist.dispatch.rows import count_places


@dataclass(frozen=True)
class Sizes:
    """What exists in packed bits (G, T, B), for each of the G ranks, on the host."""

    rows_per_rank: list[int]
    """Tokens with at least one pair."""
    pairs_per_rank: list[int]
    bytes_per_rank: list[int]
    """Packed bytes that are not zero."""


@dataclass(frozen=True)
class SendPlan:
    """What this rank sends, in send order."""

    row_token_R: Tensor
    pair_token_P: Tensor
    pair_weight_P: Tensor
    """Place of each pair's weight in the flattened (T, E) combine weights."""


@dataclass(frozen=True)
class ReceivePlan:
    """How received rows become the experts' input."""

    pair_row_P: Tensor
    """Expert order: the received row that each pair reads (rows in receive order)."""
    pair_position_P: Tensor
    """Expert order: the position that each pair has in receive order."""
    tokens_per_expert_L: Tensor


@dataclass(frozen=True)
class LocalPlan:
    """The experts' input on a rank that holds all the tokens, in expert order."""

    pair_token_P: Tensor
    pair_weight_P: Tensor
    """Place of each pair's weight in the flattened (tokens, L) combine weights."""
    tokens_per_expert_L: Tensor


def pack_by_rank(routing_map_TE: Tensor, num_ranks: int) -> Tensor:
    """Pack a routing map (T, E) into the bytes (G, T, B) for each rank; rank g holds experts g*L ... (g+1)*L - 1."""
    tokens, experts = routing_map_TE.shape
    packed_TGB = pack_bits(routing_map_TE.reshape(tokens, num_ranks, experts // num_ranks))
    return packed_TGB.transpose(0, 1).contiguous()


def count_packed(packed_GTB: Tensor) -> Tensor:
    """Count the rows, the pairs and the nonzero bytes of each rank: int64 (3, G), still on the device."""
    ranks, tokens, width = packed_GTB.shape
    bits = _bits_set(packed_GTB.device).index_select(0, packed_GTB.flatten().int()).view(ranks, tokens, width)
    pairs_GT = bits.sum(dim=-1)
    return torch.stack([(pairs_GT > 0).sum(dim=1), pairs_GT.sum(dim=1), (bits > 0).sum(dim=(1, 2))])


def packed_sizes(*packed_GTB: Tensor) -> list[Sizes]:
    """Count what is in packed bits (G, T, B), all of them with one copy to the host."""
    counts = torch.stack([count_packed(packed) for packed in packed_GTB]).tolist()
    return [Sizes(*count) for count in counts]


def joined(*sizes: Sizes) -> Sizes:
    """Return the sizes of packed bits that are joined along their first axis."""
    return Sizes(
        [count for each in sizes for count in each.rows_per_rank],
        [count for each in sizes for count in each.pairs_per_rank],
        [count for each in sizes for count in each.bytes_per_rank],
    )


def plan_sending(packed_GTB: Tensor, local_experts: int, sizes: Sizes) -> SendPlan:
    """Plan the rows and pairs that leave this rank.

    Args:
        packed_GTB: (G, T, B) uint8, which of rank g's experts each token of this rank uses.
        local_experts: L.
        sizes: what is in these bits.
    """
    ranks, tokens, _ = packed_GTB.shape
    pair_source_P, pair_expert_P = _pairs(packed_GTB.flatten(0, 1), sizes)
    pair_rank_P = pair_source_P.div(max(tokens, 1), rounding_mode="floor")
    pair_token_P = pair_source_P - pair_rank_P * tokens
    needed_S = _needed(packed_GTB)
    return SendPlan(
        row_token_R=_true_places(needed_S, sum(sizes.rows_per_rank)).remainder(max(tokens, 1)),
        pair_token_P=pair_token_P,
        pair_weight_P=(pair_token_P * ranks + pair_rank_P) * local_experts + pair_expert_P,
    )


def plan_receiving(packed_GTB: Tensor, local_experts: int, sizes: Sizes) -> ReceivePlan:
    """Plan what this rank does with the rows it receives.

    Args:
        packed_GTB: (G, T, B) uint8, for each source rank and token which of *this* rank's experts the token uses.
        local_experts: L.
        sizes: what is in these bits.
    """
    pair_source_P, pair_expert_P = _pairs(packed_GTB.flatten(0, 1), sizes)
    pair_position_P = pair_expert_P.argsort(stable=True)
    row_S = _needed(packed_GTB).cumsum(0) - 1
    return ReceivePlan(
        pair_row_P=row_S.index_select(0, pair_source_P.index_select(0, pair_position_P)),
        pair_position_P=pair_position_P,
        tokens_per_expert_L=count_places(pair_expert_P, local_experts),
    )


def plan_locally(packed_TB: Tensor, local_experts: int, sizes: Sizes) -> LocalPlan:
    """Plan the experts' input where every token is at hand.

    Args:
        packed_TB: (tokens, B) uint8, which of this rank's experts each token uses.
        local_experts: L.
        sizes: what is in these bits.
    """
    pair_token_P, pair_expert_P = _pairs(packed_TB, sizes)
    order_P = pair_expert_P.argsort(stable=True)
    pair_token_P = pair_token_P.index_select(0, order_P)
    return LocalPlan(
        pair_token_P=pair_token_P,
        pair_weight_P=pair_token_P * local_experts + pair_expert_P.index_select(0, order_P),
        tokens_per_expert_L=count_places(pair_expert_P, local_experts),
    )


def pack_bits(map_TL: Tensor) -> Tensor:
    """Pack a bool map (..., L) into bytes (..., ceil(L / 8)), lowest expert in the lowest bit."""
    missing = -map_TL.shape[-1] % 8
    bits = torch.nn.functional.pad(map_TL, (0, missing)) if missing else map_TL.contiguous()
    # Eight bools are one little-endian word. The factor has the bits 7, 14, ..., 56, so that bool i, bit 8i of the
    # word, arrives at bit 56 + i of the product; no two terms meet at one bit, hence nothing is carried.
    words = bits.view(torch.int64) * 0x0102040810204080
    return (words >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, local_experts: int) -> Tensor:
    """Undo :func:`pack_bits`."""
    bits = _bits_of_bytes(packed.device).index_select(0, packed.flatten().int())
    return bits.view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :local_experts]


def _pairs(packed_SB: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return the source s and the local expert of each pair, by source and then by expert.

    Most bytes are zero where experts are many, so the search goes over bytes first and over bits in what it found.
    """
    width = packed_SB.shape[1]
    flat = packed_SB.flatten()
    byte_Y = _true_places(flat, sum(sizes.bytes_per_rank))
    bits_Y8 = _words_of_bytes(flat.device).index_select(0, flat.index_select(0, byte_Y).int()).view(torch.bool)
    bit_P = _true_places(bits_Y8, sum(sizes.pairs_per_rank))
    byte_P = byte_Y.index_select(0, bit_P >> 3)
    if width == 1:
        return byte_P, bit_P & 7
    source_P = byte_P.div(width, rounding_mode="floor")
    return source_P, ((byte_P - source_P * width) << 3) + (bit_P & 7)


def _needed(packed_GTB: Tensor) -> Tensor:
    """Bool (G x T,): the tokens that use at least one expert of the rank."""
    return packed_GTB.sum(dim=-1, dtype=torch.int32).flatten() > 0


def _true_places(mask: Tensor, count: int) -> Tensor:
    """Return the flat places (count,) where a mask is not zero, in order; ``count`` must be how many there are."""
    return torch.nonzero_static(mask, size=count).squeeze(1)


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """Bool (256, 8): the bits of each byte, lowest first."""
    byte, bit = torch.arange(256, device=device).unsqueeze(1), torch.arange(8, device=device)
    return (byte >> bit).bitwise_and(1).bool()


@cache
def _words_of_bytes(device: torch.device) -> Tensor:
    """Int64 (256,): the eight bools of each byte as one word, because a lookup of words is faster."""
    return _bits_of_bytes(device).view(torch.int64).squeeze(1)


@cache
def _bits_set(device: torch.device) -> Tensor:
    """Int32 (256,): how many bits of each byte are set."""
    return _bits_of_bytes(device).sum(dim=1).int()
