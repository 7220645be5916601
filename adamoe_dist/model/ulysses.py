"""Attention heads in exchange for sequence, over the context-parallel ranks (DeepSpeed-Ulysses, arXiv 2309.14509).

Legend: C context-parallel ranks, S tokens of a whole sequence, B batch, N heads, D head width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def heads_for_sequence(parts: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Give each rank the whole sequence of its share of the heads, with one exchange.

    Args:
        parts: tensors (S / C, B, N_i, D) of this rank's part of the sequence; C divides each N_i.
        group: the context-parallel ranks, in the order of their parts.

    Returns:
        Tensors (S, B, N_i / C, D).
    """
    ranks = group.size()
    shares = [part.shape[2] // ranks for part in parts]
    assert all(part.shape[2] % ranks == 0 for part in parts), [part.shape for part in parts]
    split = [part.unflatten(2, (ranks, share)) for part, share in zip(parts, shares, strict=True)]
    outgoing_CSBND = torch.cat(split, dim=3).permute(2, 0, 1, 3, 4)
    whole_SBND = _Exchange.apply(outgoing_CSBND, group).flatten(0, 1)
    return list(whole_SBND.split(shares, dim=2))


def sequence_for_heads(whole_SBND: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Undo :func:`heads_for_sequence` for one tensor: (S, B, N / C, D) to (S / C, B, N, D)."""
    ranks = group.size()
    incoming_CSBND = _Exchange.apply(whole_SBND.unflatten(0, (ranks, -1)), group)
    return incoming_CSBND.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Block c of the first axis goes to rank c; its gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        outgoing = blocks.contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
        return incoming

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        outgoing = gradients[0].contiguous()
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=ctx.group)
        return incoming, None
