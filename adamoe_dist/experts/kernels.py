"""Products of rows, sorted by expert, with their experts' matrices.

Legend: P rows sorted by expert, L local experts, I input width, O output width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_mm(rows_PI: Tensor, weight_LOI: Tensor, counts_L: Tensor) -> Tensor:
    """Multiply each expert's rows with its matrix in one grouped product.

    Args:
        rows_PI: (P, I) rows sorted by expert.
        weight_LOI: (L, O, I) one matrix an expert.
        counts_L: (L,) rows of each expert, summing to P; zeros allowed.

    Returns:
        (P, O). Every matrix gets a gradient, zero where its expert has no row.
    """
    if rows_PI.shape[0] == 0:
        return _no_rows(rows_PI, weight_LOI)
    ends_L = counts_L.cumsum(0).to(device=rows_PI.device, dtype=torch.int32)
    return _ContiguousGradient.apply(F.grouped_mm(rows_PI, weight_LOI.transpose(1, 2), offs=ends_L))


def sequential(rows_PI: Tensor, weight_LOI: Tensor, counts_L: Tensor) -> Tensor:
    """Do what :func:`grouped_mm` does with one product an expert."""
    if rows_PI.shape[0] == 0:
        return _no_rows(rows_PI, weight_LOI)
    parts = rows_PI.split(counts_L.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_LOI.unbind(0), strict=True)])


def _no_rows(rows_PI: Tensor, weight_LOI: Tensor) -> Tensor:
    """Return (0, O) that still depends on the rows and on every matrix, so that each gets a zero gradient."""
    empty_PO = rows_PI @ weight_LOI.new_zeros(rows_PI.shape[1], weight_LOI.shape[1])
    return empty_PO + weight_LOI[:0].sum()


class _ContiguousGradient(torch.autograd.Function):
    """Pass on a contiguous gradient: grouped_mm's backward refuses an expanded one."""

    @staticmethod
    def forward(ctx: object, output: Tensor) -> Tensor:
        return output

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


KERNELS: dict[str, GroupedProduct] = {"grouped_mm": grouped_mm, "sequential": sequential}


def choose_kernel(requested: str, dtype: torch.dtype, cuda: bool, widths: tuple[int, ...]) -> tuple[str, str]:
    """Resolve ``moe.experts.kernel`` to a kernel's name and the reason for it.

    Args:
        requested: ``auto``, ``grouped_mm`` or ``sequential``.
        dtype: the experts' compute dtype.
        cuda: whether the products run on CUDA.
        widths: the matrices' widths, which grouped_mm on CUDA wants in multiples of 16 bytes.
    """
    if requested != "auto":
        return requested, "as configured"
    if not cuda:
        return "grouped_mm", "auto: one grouped product on CPU"
    if dtype != torch.bfloat16:
        return "sequential", f"auto: grouped_mm on CUDA is for bf16, this model computes in {dtype}"
    if any(width * dtype.itemsize % 16 for width in widths):
        return "sequential", f"auto: grouped_mm on CUDA needs widths in multiples of 16 bytes, these are {widths}"
    return "grouped_mm", "auto: one grouped product on CUDA"
