"""Which experts a token uses, and with what weight.

Axes: T tokens, E true experts (n), N null experts (m), W null experts that have an output (the last of the N),
A = E + N (true experts first), K selected slots.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalize = Literal["true_experts", "all_selected", "all_true", "none"]
ScoreFunction = Literal["softmax", "sigmoid"]

NO_SCORE = 1e-20
"""Added to sums of sigmoid scores before they divide, as Megatron does: an empty sum gives 0, not NaN."""


def same_weights(normalize: Normalize, score_function: ScoreFunction, num_null: int) -> Normalize:
    """Return the rule that leaves true experts their weights where a model gets its first null experts, or none again.

    Plain softmax scores are shares among all columns: null ones would make every weight smaller.

    Args:
        normalize: the model's rule.
        score_function: of its router.
        num_null: m from now on.
    """
    if num_null == 0:
        return "none" if normalize == "all_true" else normalize
    return "all_true" if normalize == "none" and score_function == "softmax" else normalize


@dataclass(frozen=True, eq=False)
class Selection:
    """The outcome of routing T tokens.

    `probs_TE` and `routing_map_TE` are views of wider tensors when there are null experts: their rows are
    contiguous, the tensors are not.

    Attributes:
        probs_TE: Combine weights over the true experts, fp32 (fp64 for fp64 logits), 0 where not selected.
        selected_TA: Bool, the slots of real tokens over true and null experts; all false for padding.
        top_indices_TK: int64, the columns chosen, best first; those of padding tokens mean nothing.
        null_probs_TW: Weights of the null experts that have an output, 0 where not selected; (T, 0) without.
        real_T: Bool, false for padding.
        ranking_TA: What the columns were chosen by: scores or logits, with the bias if there is one.
    """

    probs_TE: Tensor
    selected_TA: Tensor
    top_indices_TK: Tensor
    null_probs_TW: Tensor
    real_T: Tensor
    ranking_TA: Tensor

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
    *,
    score_function: ScoreFunction = "softmax",
    bias_E: Tensor | None = None,
    num_with_output: int = 0,
) -> Selection:
    """Select k of the n + m experts of each token and weigh those that have an output (AdaMoE, eq. 1).

    The selection is by top-k over all columns; among equals the lowest column wins, whatever else is in the
    batch (`ranked_top_k`). With a bias it is the top-k of score + bias (LongCat-Flash), where the score is the
    softmax over all n + m logits or the sigmoid of each; the bias touches no weight and has no gradient.

    Weights are given to the experts that have an output: true experts, and identity and constant null experts
    (MoE++). With zero experts only, these are the true experts. The weights are

    * `true_experts`: softmax over the selected logits of experts that have an output, so that they sum to 1, or
      to 0 for a token that chose zero experts only. With zero experts only, the task loss then gives null
      logits a gradient of exactly zero, and true logits one only where a token has at least two true experts.
    * `all_selected`: softmax over all k selected logits, of which those of zero experts are then dropped.
    * `all_true`: softmax over the n true logits, selected or not. A null expert takes no share of the weights, so
      that null experts added to a model of plain scores change no weight; for zero experts and softmax only.
    * `none`: softmax over all n + m logits, not renormalised.

    With `score_function="sigmoid"` the first two divide the selected sigmoid scores by their sum, and `none`
    takes the scores as they are.

    Without null experts and without ties, `true_experts` (and `all_selected`) equals Megatron's softmax after
    top-k, and its sigmoid for k > 1, and `none` (and `all_true`) its softmax before top-k, bit for bit, in value
    and in gradient. (At k = 1 Megatron leaves a sigmoid score as it is: `none`.)

    Args:
        logits_TA: Router logits (T, A) in fp32 or fp64, the `num_true` true experts first. NaN and infinity pass
            into the weights of their token alone.
        num_true: Number of true experts n, at most A.
        top_k: Slots per token k, at most A.
        normalize: How the weights are scaled.
        padding_mask_T: Bool (T,), true for padding. Padding goes to no expert, and its logits receive a
            gradient of exactly zero.
        score_function: What makes scores of logits.
        bias_E: fp32 (E,), added to the true experts' scores for the selection alone.
        num_with_output: W, how many of the last null columns have an output.

    Returns:
        The selection.
    """
    experts = logits_TA.shape[1]
    assert 0 < top_k <= experts, f"top_k {top_k} of {experts} experts"
    assert logits_TA.dtype in (torch.float32, torch.float64), f"router logits in {logits_TA.dtype}"
    assert num_true <= experts, f"{num_true} true experts of {experts}"
    assert num_with_output <= experts - num_true, f"{num_with_output} of {experts - num_true} null experts"
    if normalize == "all_true":
        assert score_function == "softmax" and num_with_output == 0, (score_function, num_with_output)
    if padding_mask_T is not None:
        logits_TA = logits_TA.masked_fill(padding_mask_T.unsqueeze(1), 0.0)
    # Where softmax rounds two logits to one probability, their order is that of Megatron's pre-softmax path.
    is_plain_softmax = normalize in ("none", "all_true") and score_function == "softmax"
    ranking_TA = scores_TA = torch.softmax(logits_TA, dim=1) if is_plain_softmax else logits_TA
    if normalize == "all_true" and num_true < experts:
        scores_TA = F.pad(torch.softmax(logits_TA[:, :num_true], dim=1), (0, experts - num_true))
    ranking_TA = ranking_TA if bias_E is None else biased_scores(logits_TA, score_function, bias_E)
    top_indices_TK = ranked_top_k(ranking_TA, top_k)
    first_with_output = experts - num_with_output
    dropped_TK = (top_indices_TK >= num_true) & (top_indices_TK < first_with_output)
    if padding_mask_T is not None:
        dropped_TK = dropped_TK | padding_mask_T.unsqueeze(1)
    scores_TK = scores_TA.gather(1, top_indices_TK)
    if score_function == "softmax":
        probs_TK = _softmax_weights(scores_TK, dropped_TK, normalize)
    else:
        probs_TK = _sigmoid_weights(scores_TK, dropped_TK, normalize)
    probs_TA = torch.zeros_like(logits_TA).scatter(1, top_indices_TK, probs_TK)
    return Selection(
        probs_TE=probs_TA[:, :num_true],
        selected_TA=_selected(logits_TA, top_indices_TK, padding_mask_T),
        top_indices_TK=top_indices_TK,
        null_probs_TW=probs_TA[:, first_with_output:],
        real_T=logits_TA.new_ones(logits_TA.shape[0], dtype=torch.bool) if padding_mask_T is None else ~padding_mask_T,
        ranking_TA=ranking_TA,
    )


@torch.no_grad()
def ranked_top_k(scores_TA: Tensor, top_k: int) -> Tensor:
    """Columns of the k highest scores of each row, best first; among equals the lowest column wins.

    `torch.topk` promises nothing about equals. Here fp32 scores become int64 keys, of which no two in a row are
    equal: the score's bits in an order-preserving form above, the column, reversed, below. That costs no more
    than `topk` of the scores (docs/design.md); fp64 scores, which leave no room for a column, are sorted.
    Negative and positive zero are equal; NaN has a place that depends on its bits alone.

    Args:
        scores_TA: Scores (T, A) in fp32 or fp64.
        top_k: Columns to choose, at most A.

    Returns:
        int64 (T, K).
    """
    scores_TA = scores_TA + 0.0  # -0.0 + 0.0 is 0.0
    if scores_TA.dtype == torch.float64:
        return torch.sort(scores_TA, dim=1, descending=True, stable=True).indices[:, :top_k]
    bits_TA = scores_TA.view(torch.int32)
    ordered_TA = bits_TA ^ ((bits_TA >> 31) & 0x7FFFFFFF)
    reversed_A = torch.arange(scores_TA.shape[1] - 1, -1, -1, device=scores_TA.device)
    keys_TA = ordered_TA.long().mul_(2**32).add_(reversed_A)
    return torch.topk(keys_TA, top_k, dim=1).indices


@torch.no_grad()
def biased_scores(logits_TA: Tensor, score_function: ScoreFunction, bias_E: Tensor) -> Tensor:
    """What `select` chooses by where there is a bias (T, A): scores, the true experts' plus bias, all less the largest.

    Less the largest bias, a bias that is the same for all leaves the true experts' scores as they are, to the bit, and
    so their order: 1 for all shuts every zero expert out of a model that has none and changes nothing else. Ties go to
    the lower column, and no score of a null expert, at most 1, less 1 is above a true one's.

    The CPU's fp32 sigmoid rounds an element by its place in memory, hence by the batch; rounding an fp64 one does
    not.
    """
    if score_function == "softmax":
        scores_TA = torch.softmax(logits_TA, dim=1)
    else:
        scores_TA = torch.sigmoid(logits_TA.double()).to(logits_TA.dtype)
    bias_E = bias_E.to(scores_TA.dtype)
    bias_A = F.pad(bias_E, (0, scores_TA.shape[1] - bias_E.shape[0]))
    return scores_TA + (bias_A - bias_E.max())


def _softmax_weights(scores_TK: Tensor, dropped_TK: Tensor, normalize: Normalize) -> Tensor:
    """Weight of each slot, 0 in the dropped ones, with no NaN where a token drops all of its slots."""
    if normalize == "true_experts":
        # Not -inf: a row of it gives NaN, masked in the end but reported by autograd's anomaly detection.
        lowest = torch.finfo(scores_TK.dtype).min
        scores_TK = torch.softmax(scores_TK.masked_fill(dropped_TK, lowest), dim=1)
    elif normalize == "all_selected":
        scores_TK = torch.softmax(scores_TK, dim=1)
    return scores_TK.masked_fill(dropped_TK, 0.0)


def _sigmoid_weights(logits_TK: Tensor, dropped_TK: Tensor, normalize: Normalize) -> Tensor:
    """Weight of each slot, 0 in the dropped ones and where there is nothing to divide by."""
    scores_TK = torch.sigmoid(logits_TK)
    if normalize == "true_experts":
        scores_TK = scores_TK.masked_fill(dropped_TK, 0.0)
    if normalize != "none":
        scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + NO_SCORE)
    return scores_TK.masked_fill(dropped_TK, 0.0)


def _selected(logits_TA: Tensor, top_indices_TK: Tensor, padding_mask_T: Tensor | None) -> Tensor:
    """Bool (T, A): the slots of the tokens that are not padding."""
    none_TA = torch.zeros_like(logits_TA, dtype=torch.bool)
    if padding_mask_T is None:
        return none_TA.scatter(1, top_indices_TK, True)
    return none_TA.scatter(1, top_indices_TK, ~padding_mask_T.unsqueeze(1).expand_as(top_indices_TK))
