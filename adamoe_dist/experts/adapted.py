"""Low-rank adapters of the true experts: each expert has its own.

Legend: P rows sorted by expert, L local experts, H hidden size, F inner width, r rank.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.experts.kernels import GroupedProduct, grouped_mm, sequential

if TYPE_CHECKING:
    from adamoe_dist.experts.grouped import GroupedExperts

_ALIGNMENT_BYTES = 16


class AdaptedExperts(torch.nn.Module):
    """Computes experts whose matrices W are used as ``W + scale B A``.

    ``a1`` (L, r, H) and ``b1`` (L, 2F, r) belong to gate and up, ``a2`` (L, r, F) and ``b2`` (L, H, r) to down. The
    products run over the rows that exist, as those of the experts themselves.
    """

    def __init__(self, experts: "GroupedExperts", rank: int, scale: float, seed: int, layer_number: int) -> None:
        """Make the adapters of ``experts``, whose inner width is whole on this rank.

        Args:
            experts: whose output stays the same: ``b1`` and ``b2`` are 0.
            rank: r.
            scale: of what is added.
            seed: of ``a1`` and ``a2``, with
            layer_number: the layer's, from 1, and each expert's own number.
        """
        super().__init__()
        assert experts.tensor_size == 1, "experts cut over ranks have no adapters"
        self.scale = scale
        local, width, inner = experts.num_local_experts, experts.config.hidden_size, experts.inner_width
        dtype = experts.weight1.dtype
        a1_LrH, a2_LrF = torch.empty(local, rank, width), torch.empty(local, rank, inner)
        first = experts.ep_rank * local
        for number in range(local):
            generator = platform.seeded_generator(seed, layer_number, first + number, rank)
            for matrix in (a1_LrH[number], a2_LrF[number]):
                matrix.uniform_(-1.0, 1.0, generator=generator).div_(matrix.shape[1] ** 0.5)
        self.a1, self.b1 = (_parameter(v, experts) for v in (a1_LrH, torch.zeros(local, 2 * inner, rank)))
        self.a2, self.b2 = (_parameter(v, experts) for v in (a2_LrF, torch.zeros(local, width, rank)))
        is_aligned = rank * dtype.itemsize % _ALIGNMENT_BYTES == 0
        self.product: GroupedProduct = grouped_mm if experts.config.experts_kernel == "grouped_mm" else sequential
        self.narrow_product: GroupedProduct = self.product if is_aligned else sequential

    def forward(self, rows_PH: Tensor, weight1: Tensor, weight2: Tensor, counts_L: Tensor, weights_P: Tensor) -> Tensor:
        """Compute as :func:`adamoe_dist.experts.kernels.composed` does, with the adapters in each product."""
        gate, up = self._adapted(rows_PH, weight1, self.a1, self.b1, counts_L).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        inner = (inner * weights_P.unsqueeze(-1)).to(inner.dtype)
        return self._adapted(inner, weight2, self.a2, self.b2, counts_L)

    def _adapted(self, rows_PI: Tensor, weight_LOI: Tensor, a_LrI: Tensor, b_LOr: Tensor, counts_L: Tensor) -> Tensor:
        inner_Pr = self.narrow_product(rows_PI, a_LrI, counts_L)
        added_PO = self.narrow_product(inner_Pr, b_LOr, counts_L)
        return self.product(rows_PI, weight_LOI, counts_L) + added_PO * self.scale


def _parameter(value: Tensor, experts: "GroupedExperts") -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(value.to(experts.weight1.dtype))
    parameter.is_expert = True  # type: ignore[attr-defined]
    parameter.allreduce = experts.ep_size == 1  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter
