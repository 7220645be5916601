"""Sums of rows."""

from typing import Any, cast

import torch
from torch import Tensor


class _SumRows(torch.autograd.Function):
    """index_add into zeros that keeps only the places for backward; torch's own keeps the rows as well."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, place_R: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place_R)
        return rows_RH.new_zeros(size, rows_RH.shape[1]).index_add_(0, place_R, rows_RH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place_R,) = ctx.saved_tensors
        return gradients[0].index_select(0, place_R), None, None


def sum_rows(rows_RH: Tensor, place_R: Tensor, size: int) -> Tensor:
    """Sum rows (R, H) by place into (size, H); places without a row get exactly zero."""
    return cast(Tensor, _SumRows.apply(rows_RH, place_R, size))
