"""What null experts return: nothing, the token itself, or a mixture of the token and a learned vector (MoE++).

Axes: T tokens, H hidden size, I identity experts, C constant experts, W = I + C (identity experts first).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class NullExperts(torch.nn.Module):
    """The learned part of one layer's null experts: `constant` (C, H) and `mixture_weight` (C, 2, H).

    They are on every rank, as the router is, and no token leaves its rank for them.

    `constant` starts at zero and `mixture_weight` like the router's rows, so that a constant expert starts as about
    half of an identity expert, and adds no direction that all tokens have in common. Both learn from the first step:
    the gradient of `constant` is weighted by about one half, and the experts differ by the tokens that select them.
    """

    def __init__(
        self,
        num_constant: int,
        hidden_size: int,
        init_method: Callable[[Tensor], object],
        dtype: torch.dtype,
        sequence_parallel: bool,
    ) -> None:
        """Allocate and fill the parameters.

        Args:
            num_constant: C.
            hidden_size: H.
            init_method: Fills a tensor in place.
            dtype: The parameters' dtype.
            sequence_parallel: Whether their gradients are of a part of the sequence.
        """
        super().__init__()
        mixture_C2H = torch.empty(num_constant, 2, hidden_size, dtype=torch.float32)
        if num_constant:
            init_method(mixture_C2H)
        self.mixture_weight = torch.nn.Parameter(mixture_C2H.to(dtype)) if num_constant else None
        self.constant = (
            torch.nn.Parameter(torch.zeros(num_constant, hidden_size, dtype=dtype)) if num_constant else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens_TH: Tensor, weights_TW: Tensor) -> Tensor:
        """Return the weighted sum (T, H) of the null experts' outputs, zero for a token that selected none.

        Args:
            tokens_TH: Token vectors.
            weights_TW: Combine weights of identity and constant experts.
        """
        if self.constant is None or self.mixture_weight is None:
            return identity_output(tokens_TH, weights_TW)
        num_identity = weights_TW.shape[1] - self.constant.shape[0]
        weights_TI, weights_TC = weights_TW.split([num_identity, self.constant.shape[0]], dim=1)
        return null_output(tokens_TH, weights_TI, weights_TC, self.mixture_weight, self.constant)


def identity_output(tokens_TH: Tensor, weights_TI: Tensor) -> Tensor:
    """The token times the sum of its identity experts' weights, (T, H)."""
    return weights_TI.sum(dim=1, keepdim=True).to(tokens_TH.dtype) * tokens_TH


def null_output(
    tokens_TH: Tensor, weights_TI: Tensor, weights_TC: Tensor, mixture_C2H: Tensor, constant_CH: Tensor
) -> Tensor:
    """Weighted sum of identity and constant experts: `sum_i w_i x + sum_c w_c (a_c1 x + a_c2 v_c)`.

    `[a_c1, a_c2] = softmax(W_c x)`, in fp32. The factors of x are added first, so that one tensor (T, H) is made,
    not one for each expert.

    Args:
        tokens_TH: Token vectors x.
        weights_TI: Combine weights of the identity experts.
        weights_TC: Combine weights of the constant experts.
        mixture_C2H: W_c of each constant expert.
        constant_CH: v_c of each constant expert.

    Returns:
        (T, H) in the tokens' dtype.
    """
    dtype = tokens_TH.dtype
    scores_TM = F.linear(tokens_TH, mixture_C2H.flatten(0, 1).to(dtype))
    mixture_TC2 = torch.softmax(scores_TM.unflatten(1, (-1, 2)).to(weights_TC.dtype), dim=2)
    weighted_TC2 = weights_TC.unsqueeze(2) * mixture_TC2
    factor_T1 = weights_TI.sum(dim=1, keepdim=True) + weighted_TC2[..., 0].sum(dim=1, keepdim=True)
    return factor_T1.to(dtype) * tokens_TH + weighted_TC2[..., 1].to(dtype) @ constant_CH.to(dtype)
