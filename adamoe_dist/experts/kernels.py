"""Experts applied to rows that are sorted by expert.

Legend: P rows sorted by expert, L local experts, H hidden size, F inner width, I input width, O output width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from adamoe_dist.errors import UserError
from adamoe_dist.experts.threaded import threaded_experts

GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
ExpertsKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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


def composed(
    product: GroupedProduct, rows_PH: Tensor, weight1: Tensor, weight2: Tensor, counts_L: Tensor, weights_P: Tensor
) -> Tensor:
    """Compute weighted SwiGLU experts from a grouped product.

    Args:
        product: :func:`grouped_mm` or :func:`sequential`.
        rows_PH: (P, H) rows sorted by expert.
        weight1: (L, 2F, H) gate and up projections.
        weight2: (L, H, F) down projections.
        counts_L: (L,) rows of each expert, summing to P; zeros allowed.
        weights_P: (P,) combine weights, applied before the down projection.

    Returns:
        (P, H) in the rows' dtype. Every matrix gets a gradient, zero where its expert has no row.
    """
    gate, up = product(rows_PH, weight1, counts_L).chunk(2, dim=-1)
    inner = F.silu(gate) * up
    inner = (inner * weights_P.unsqueeze(-1)).to(inner.dtype)
    return product(inner, weight2, counts_L)


KERNELS: dict[str, ExpertsKernel] = {
    "grouped_mm": partial(composed, grouped_mm),
    "sequential": partial(composed, sequential),
    "threaded": threaded_experts,
}


def choose_kernel(requested: str, dtype: torch.dtype, cuda: bool, widths: tuple[int, ...]) -> tuple[str, str]:
    """Resolve ``moe.experts.kernel`` to a kernel's name and the reason for it.

    Args:
        requested: ``auto`` or a name in ``KERNELS``.
        dtype: the experts' compute dtype.
        cuda: whether the products run on CUDA.
        widths: the matrices' widths, which grouped_mm on CUDA wants in multiples of 16 bytes.

    Raises:
        UserError: the kernel does not run on this device.
    """
    if requested == "threaded" and cuda:
        raise UserError("moe.experts.kernel=threaded computes on CPU cores and this run is on CUDA; use auto")
    if requested != "auto":
        return requested, "as configured"
    if not cuda:
        return "threaded", "auto: an expert a core at a time on CPU"
    if dtype != torch.bfloat16:
        return "sequential", f"auto: grouped_mm on CUDA is for bf16, this model computes in {dtype}"
    if any(width * dtype.itemsize % 16 for width in widths):
        return "sequential", f"auto: grouped_mm on CUDA needs widths in multiples of 16 bytes, these are {widths}"
    return "grouped_mm", "auto: one grouped product on CUDA"
