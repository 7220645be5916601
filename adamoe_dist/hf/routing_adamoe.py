"""Which experts a token of an AdaMoE model uses, with what weight, and the router's losses.

This file is saved beside exported weights, so it imports nothing but torch.

Axes: T tokens, E true experts (n), N null experts (m), W null experts that have an output (the last of the N),
A = E + N (true experts first), K selected slots.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NO_SCORE = 1e-20  # added to sums of sigmoid scores before they divide: an empty sum gives 0, not NaN


class Routes(NamedTuple):
    """What a router decided.

    Attributes:
        weights_TE: combine weights of the true experts, 0 where not selected.
        selected_TA: bool, the slots of real tokens over true and null experts.
        null_weights_TW: weights of the null experts that have an output.
    """

    weights_TE: Tensor
    selected_TA: Tensor
    null_weights_TW: Tensor


def select(
    logits_TA: Tensor,
    num_true: int,
    top_k: int,
    normalize: str,
    score_function: str = "softmax",
    bias_E: Tensor | None = None,
    num_with_output: int = 0,
    real_T: Tensor | None = None,
) -> Routes:
    """Select k of the n + m experts of each token, the lowest column among equals, and weigh those with an output.

    Args:
        logits_TA: fp32 or fp64.
        num_true: n.
        top_k: k.
        normalize: over what the weights sum to 1; see the configuration.
        score_function: "softmax" or "sigmoid".
        bias_E: added to the true experts' scores for the selection alone.
        num_with_output: W.
        real_T: bool, false for padding, which goes nowhere; None: all tokens are real.
    """
    if real_T is not None:
        logits_TA = logits_TA.masked_fill(~real_T.unsqueeze(1), 0.0)
    first_with_output = logits_TA.shape[1] - num_with_output
    scores_TA = _scores(logits_TA, num_true, normalize, score_function)
    ranking_TA = _ranking(logits_TA, normalize, score_function, bias_E)
    chosen_TK = ranked_top_k(ranking_TA, top_k)
    dropped_TK = (chosen_TK >= num_true) & (chosen_TK < first_with_output)
    if real_T is not None:
        dropped_TK = dropped_TK | ~real_T.unsqueeze(1)
    weights_TK = _weights(scores_TA.gather(1, chosen_TK), dropped_TK, normalize, score_function)
    weights_TA = torch.zeros_like(logits_TA).scatter(1, chosen_TK, weights_TK)
    selected_TA = torch.zeros_like(logits_TA, dtype=torch.bool).scatter(1, chosen_TK, True)
    if real_T is not None:
        selected_TA = selected_TA & real_T.unsqueeze(1)
    return Routes(weights_TA[:, :num_true], selected_TA, weights_TA[:, first_with_output:])


@torch.no_grad()
def ranked_top_k(scores_TA: Tensor, top_k: int) -> Tensor:
    """Columns (T, K) of the k highest scores, best first; among equals the lowest column wins.

    `torch.topk` promises nothing about equals, so fp32 scores become distinct integers: their bits in an
    order-preserving form above, the column, reversed, below. fp64 scores are sorted.
    """
    scores_TA = scores_TA + 0.0  # -0.0 + 0.0 is 0.0
    if scores_TA.dtype == torch.float64:
        return torch.sort(scores_TA, dim=1, descending=True, stable=True).indices[:, :top_k]
    bits_TA = scores_TA.view(torch.int32)
    ordered_TA = bits_TA ^ ((bits_TA >> 31) & 0x7FFFFFFF)
    reversed_A = torch.arange(scores_TA.shape[1] - 1, -1, -1, device=scores_TA.device)
    return torch.topk(ordered_TA.long() * 2**32 + reversed_A, top_k, dim=1).indices


def _scores(logits_TA: Tensor, num_true: int, normalize: str, score_function: str) -> Tensor:
    """What the weights are made of: logits, except where the weights do not depend on the choice."""
    if score_function == "sigmoid":
        return logits_TA
    if normalize == "none":
        return torch.softmax(logits_TA, dim=1)
    if normalize == "all_true":
        return F.pad(torch.softmax(logits_TA[:, :num_true], dim=1), (0, logits_TA.shape[1] - num_true))
    return logits_TA


def _ranking(logits_TA: Tensor, normalize: str, score_function: str, bias_E: Tensor | None) -> Tensor:
    """What is chosen by: probabilities where the weights are ones, so that those which round to equals tie."""
    if bias_E is None:
        is_plain_softmax = score_function == "softmax" and normalize in ("none", "all_true")
        return torch.softmax(logits_TA, dim=1) if is_plain_softmax else logits_TA
    if score_function == "softmax":
        ranking_TA = torch.softmax(logits_TA, dim=1)
    else:  # a rounded fp64 sigmoid does not depend on the element's place in memory, the CPU's fp32 one does
        ranking_TA = torch.sigmoid(logits_TA.double()).to(logits_TA.dtype)
    return ranking_TA + F.pad(bias_E.to(ranking_TA.dtype), (0, ranking_TA.shape[1] - bias_E.shape[0]))


def _weights(scores_TK: Tensor, dropped_TK: Tensor, normalize: str, score_function: str) -> Tensor:
    if score_function == "sigmoid":
        scores_TK = torch.sigmoid(scores_TK)
        if normalize == "true_experts":
            scores_TK = scores_TK.masked_fill(dropped_TK, 0.0)
        if normalize != "none":
            scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + NO_SCORE)
    elif normalize == "true_experts":
        scores_TK = torch.softmax(scores_TK.masked_fill(dropped_TK, torch.finfo(scores_TK.dtype).min), dim=1)
    elif normalize == "all_selected":
        scores_TK = torch.softmax(scores_TK, dim=1)
    return scores_TK.masked_fill(dropped_TK, 0.0)


def balance_loss(
    logits_TA: Tensor,
    selected_TA: Tensor,
    num_true: int,
    kind: str,
    score_function: str = "softmax",
    target_null_share: float | None = None,
    real_T: Tensor | None = None,
) -> Tensor:
    """Return ``(n + m) sum_i f_i P_i``, which is k at balance (AdaMoE, equations 3 to 6).

    f_i is the part of the real tokens that selected expert i, P_i their mean probability of it. Under "null_averaged"
    the null experts' f are replaced by their mean; under "grouped" only the group of true experts is balanced against
    the group of null experts; "switch" takes f as it is.

    Args:
        logits_TA: the router's logits.
        selected_TA: what was selected from them.
        num_true: n.
        kind: as said.
        score_function: what makes probabilities of logits.
        target_null_share: of "grouped"; None: m / (n + m).
        real_T: bool, false for padding; None: all tokens are real.
    """
    experts = logits_TA.shape[1]
    if real_T is None:
        real_T = torch.ones_like(selected_TA[:, 0])
    tokens = real_T.sum().clamp(min=1)
    logits_TA = logits_TA.masked_fill(~real_T.unsqueeze(1), 0.0)
    if score_function == "softmax":
        probabilities_TA = torch.softmax(logits_TA, dim=1)
    else:
        sigmoid_TA = torch.sigmoid(logits_TA)
        probabilities_TA = sigmoid_TA / (sigmoid_TA.sum(dim=1, keepdim=True) + NO_SCORE)
    mean_A = probabilities_TA.masked_fill(~real_T.unsqueeze(1), 0.0).sum(dim=0) / tokens
    loads_A = (selected_TA & real_T.unsqueeze(1)).sum(dim=0).to(mean_A.dtype) / tokens
    return experts * (_balanced(loads_A, num_true, kind, target_null_share) * mean_A).sum()


def _balanced(loads_A: Tensor, num_true: int, kind: str, target_null_share: float | None) -> Tensor:
    experts = loads_A.shape[0]
    if kind == "switch" or experts == num_true:
        return loads_A
    true_E, null_N = loads_A[:num_true], loads_A[num_true:]
    if kind == "null_averaged":
        return torch.cat((true_E, null_N.mean().expand_as(null_N)))
    share = (experts - num_true) / experts if target_null_share is None else target_null_share
    true_load = true_E.sum() / (experts * (1.0 - share))
    null_load = null_N.sum() / (experts * share)
    return torch.cat((true_load.expand_as(true_E), null_load.expand_as(null_N)))


def z_loss(logits_TA: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean over real tokens of the squared log-sum-exp of the logits."""
    if real_T is None:
        return torch.logsumexp(logits_TA, dim=1).square().mean()
    squared_T = torch.logsumexp(logits_TA.masked_fill(~real_T.unsqueeze(1), 0.0), dim=1).square()
    return squared_T.masked_fill(~real_T, 0.0).sum() / real_T.sum().clamp(min=1)
