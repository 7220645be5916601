"""The differentiable all-to-all over the expert-parallel group."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Exchange rows; backward exchanges their gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send ``send[g]`` leading entries of ``rows`` to each rank g and return what arrives, by source rank.

    Args:
        rows: (sum(send), ...) in the order of the destination ranks.
        send: entries for each rank of ``group``.
        receive: entries from each rank of ``group``.
        group: the expert-parallel group.

    Returns:
        (sum(receive), ...) in the order of the source ranks. Its gradient travels back the same way.
    """
    return cast(Tensor, _AllToAll.apply(rows, send, receive, group))


def exchange_maps(maps_G: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give rank g the slice ``maps_G[g]`` and return the slices meant for this rank, by source (no gradient)."""
    received = torch.empty_like(maps_G)
    dist.all_to_all_single(received, maps_G, group=group)
    return received
