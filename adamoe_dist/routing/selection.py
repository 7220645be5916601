"""Which experts a token uses, and with what weight.

Axes: T tokens, E true experts (n), N null experts (m), A = E + N (true experts first), K selected slots.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalize = Literal["true_experts", "all_selected", "none"]


@dataclass(frozen=True, eq=False)
class Selection:
    """The outcome of routing T tokens.

    `probs_TE` and `routing_map_TE` are views of wider tensors when there are null experts: their rows are
    contiguous, the tensors are not.

    Attributes:
        probs_TE: Combine weights over the true experts, fp32 (fp64 for fp64 logits), 0 where not selected.
        selected_TA: Bool, the slots of real tokens over true and null experts; all false for padding.
        top_indices_TK: int64, the columns chosen, best first; those of padding tokens mean nothing.
    """

    probs_TE: Tensor
    selected_TA: Tensor
    top_indices_TK: Tensor

    @property
    def num_true(self) -> int:
        """Number of true experts n."""
        return self.probs_TE.shape[1]

    @property
    def routing_map_TE(self) -> Tensor:
        """Bool (T, E): which true experts receive the token."""
        return self.selected_TA[:, : self.num_true]

    @property
    def null_map_TN(self) -> Tensor:
        """Bool (T, N): which null experts the token chose."""
        return self.selected_TA[:, self.num_true :]


def select(
    logits_TA: Tensor,
    num_true: int,
    top_k: int,
    normalize: Normalize,
    padding_mask_T: Tensor | None = None,
    bias_E: Tensor | None = None,
) -> Selection:
    """Select k of the n + m experts of each token and weigh the true ones (AdaMoE, eq. 1).

    The selection is by top-k over all columns. The weights of the selected true experts are

    * `true_experts`: softmax over the selected true logits, so that they sum to 1, or to 0 for a token that
      chose null experts only. The task loss then gives null logits a gradient of exactly zero, and true
      logits one only where a token has at least two true experts.
    * `all_selected`: softmax over all k selected logits, of which the null ones are then dropped.
    * `none`: softmax over all n + m logits, not renormalised.

    Without null experts, `true_experts` (and `all_selected`) equals Megatron's softmax after top-k and `none`
    its softmax before top-k, bit for bit, in value and in gradient.

    Args:
        logits_TA: Router logits (T, A) in fp32 or fp64, the `num_true` true experts first.
        num_true: Number of true experts n, at most A.
        top_k: Slots per token k, at most A.
        normalize: How the weights of the selected true experts are scaled.
        padding_mask_T: Bool (T,), true for padding. Padding goes to no expert, and its logits receive a
            gradient of exactly zero.
        bias_E: Added to the true experts' scores (E,) for the selection only, which is then top-k of the softmax
            over all n + m logits plus bias, whatever `normalize` is (LongCat-Flash). The weights do not contain
            it, and it has no gradient.

    Returns:
        The selection.
    """
    assert 0 < top_k <= logits_TA.shape[1], f"top_k {top_k} of {logits_TA.shape[1]} experts"
    assert logits_TA.dtype in (torch.float32, torch.float64), f"router logits in {logits_TA.dtype}"
    assert num_true <= logits_TA.shape[1], f"{num_true} true experts of {logits_TA.shape[1]}"
    if padding_mask_T is not None:
        logits_TA = logits_TA.masked_fill(padding_mask_T.unsqueeze(1), 0.0)
    # Where softmax rounds two logits to one probability, their order is that of Megatron's pre-softmax path.
    scores_TA = torch.softmax(logits_TA, dim=1) if normalize == "none" else logits_TA
    if bias_E is None:
        scores_TK, top_indices_TK = torch.topk(scores_TA, top_k, dim=1)
    else:
        top_indices_TK = torch.topk(biased_scores(logits_TA, bias_E), top_k, dim=1).indices
        scores_TK = scores_TA.gather(1, top_indices_TK)
    dropped_TK = top_indices_TK >= num_true
    if padding_mask_T is not None:
        dropped_TK = dropped_TK | padding_mask_T.unsqueeze(1)
    probs_TK = _slot_weights(scores_TK, dropped_TK, normalize)
    probs_TA = torch.zeros_like(logits_TA).scatter(1, top_indices_TK, probs_TK)
    return Selection(
        probs_TE=probs_TA[:, :num_true],
        selected_TA=_selected(logits_TA, top_indices_TK, padding_mask_T),
        top_indices_TK=top_indices_TK,
    )


@torch.no_grad()
def biased_scores(logits_TA: Tensor, bias_E: Tensor) -> Tensor:
    """What `select` chooses by where there is a bias (T, A): softmax scores, the true ones' plus bias."""
    scores_TA = torch.softmax(logits_TA, dim=1)
    scores_TA[:, : bias_E.shape[0]] += bias_E
    return scores_TA


def _slot_weights(scores_TK: Tensor, dropped_TK: Tensor, normalize: Normalize) -> Tensor:
    """Weight of each slot, 0 in the dropped ones, with no NaN where a token drops all of its slots."""
    if normalize == "true_experts":
        # Not -inf: a row of it gives NaN, masked in the end but reported by autograd's anomaly detection.
        lowest = torch.finfo(scores_TK.dtype).min
        scores_TK = torch.softmax(scores_TK.masked_fill(dropped_TK, lowest), dim=1)
    elif normalize == "all_selected":
        scores_TK = torch.softmax(scores_TK, dim=1)
    return scores_TK.masked_fill(dropped_TK, 0.0)


def _selected(logits_TA: Tensor, top_indices_TK: Tensor, padding_mask_T: Tensor | None) -> Tensor:
    """Bool (T, A): the slots of the tokens that are not padding."""
    none_TA = torch.zeros_like(logits_TA, dtype=torch.bool)
    if padding_mask_T is None:
        return none_TA.scatter(1, top_indices_TK, True)
    return none_TA.scatter(1, top_indices_TK, ~padding_mask_T.unsqueeze(1).expand_as(top_indices_TK))
