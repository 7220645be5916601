"""Rows taken from their places and summed into them, each the other's gradient."""

from typing import Any, cast

import torch
from torch import Tensor


class _TakeRows(torch.autograd.Function):
    """index_select, whose own gradient adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows_SH: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.size = rows_SH.shape[0]
        return rows_SH.index_select(0, place_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (place_R,) = ctx.saved_tensors
        return _summed(gradients[0], place_R, ctx.size), None


class _SumRows(torch.autograd.Function):
    """The sum of rows, which keeps only the places for backward."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, place_R: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place_R)
        return _summed(rows_RH, place_R, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place_R,) = ctx.saved_tensors
        return gradients[0].index_select(0, place_R), None, None


def take_rows(rows_SH: Tensor, place_R: Tensor) -> Tensor:
    """Return the rows (R, H) at places of (S, H); a place may be taken often, or never."""
    return cast(Tensor, _TakeRows.apply(rows_SH, place_R))


def sum_rows(rows_RH: Tensor, place_R: Tensor, size: int) -> Tensor:
    """Sum rows (R, H) by place into (size, H); places without a row get exactly zero."""
    return cast(Tensor, _SumRows.apply(rows_RH, place_R, size))


def count_places(place_R: Tensor, size: int) -> Tensor:
    """Count how often each of ``size`` places occurs, without waiting for the device."""
    return place_R.new_zeros(size).scatter_add(0, place_R, torch.ones_like(place_R))


def _summed(rows_RH: Tensor, place_R: Tensor, size: int) -> Tensor:
    """Sum the rows of each place in their order, in fp32 or the rows' own precision if that is higher.

    A bag a place: the cores share the places, and on CUDA the order of the terms does not change from run to run, both
    unlike index_add.
    """
    if rows_RH.shape[0] == 0:
        return rows_RH.new_zeros(size, rows_RH.shape[1])
    order_R = place_R.argsort(stable=True)
    counts_S = count_places(place_R, size)
    starts_S = counts_S.cumsum(0) - counts_S
    return torch.embedding_bag(rows_RH.detach().contiguous(), order_R, starts_S, mode=0)[0]
