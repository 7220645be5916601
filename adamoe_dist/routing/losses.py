"""Auxiliary losses of the router, without their coefficients.

Axes: T tokens, E true experts (n), N null experts (m), A = E + N (true experts first).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adamoe_dist.routing.selection import NO_SCORE, ScoreFunction, Selection

BalanceKind = Literal["null_averaged", "grouped", "switch"]


@dataclass(frozen=True, eq=False)
class BatchLoads:
    """Loads counted over more than one rank's micro-batch.

    Attributes:
        counts_A: int64 (A,), real tokens that selected each expert.
        tokens: int64 0-d, real tokens that the counts are of.
        micro_batch_tokens: int64 0-d, real tokens of all ranks in the current micro-batch alone.
        ranks: Ranks over which the losses will be averaged.
    """

    counts_A: Tensor
    tokens: Tensor
    micro_batch_tokens: Tensor
    ranks: int


def balance_loss(
    logits_TA: Tensor,
    selection: Selection,
    kind: BalanceKind,
    padding_mask_T: Tensor | None = None,
    *,
    score_function: ScoreFunction = "softmax",
    target_null_share: float | None = None,
    batch: BatchLoads | None = None,
) -> Tensor:
    """Load-balancing loss over true and null experts: `(n + m) * sum_i f_i P_i`.

    `f_i` is the fraction of real tokens that select expert i (eq. 4) and `P_i` the mean over real tokens of
    its softmax over all n + m logits (eq. 5). `null_averaged` is eq. 6: the loads of the null experts are
    replaced by their mean, so that nothing balances one null expert against another. `switch` is eq. 3 over
    n + m distinct experts. Without null experts the two are equal. `grouped` balances nothing but the group of true
    experts against the group of null experts, at a null share r (`balanced_loads`).

    At balance the value is k, as in the paper, since the f_i sum to k. Megatron's convention is 1: the same
    coefficient acts here k times as strongly.

    The loads have no gradient; the probabilities have.

    With `batch` the loads are those of many micro-batches, while the probabilities stay this rank's: their sum is
    divided by the mean number of real tokens per rank, so that the mean of the ranks' losses is the loss of all
    their tokens, however unevenly padding falls.

    Args:
        logits_TA: Router logits (T, A); the loss is computed in fp32, or in their precision if it is higher.
        selection: The selection made from these logits.
        kind: Which loads are balanced.
        padding_mask_T: Bool (T,), true for padding, which counts in neither load nor probability. The mask
            given to `select`.
        score_function: What makes probabilities of logits.
        target_null_share: r of `grouped`; None is m / (n + m).
        batch: Loads counted over more than these tokens, or None for these alone.

    Returns:
        0-d tensor; exactly 0, with zero gradients, if there is no real token.
    """
    scores_TA = _scores(logits_TA, padding_mask_T, score_function)
    if batch is None:
        counts_A, tokens = selected_counts(selection, padding_mask_T)
        tokens_per_rank = tokens.clamp(min=1).to(scores_TA.dtype)
    else:
        counts_A, tokens = batch.counts_A, batch.tokens
        tokens_per_rank = batch.micro_batch_tokens.clamp(min=1).to(scores_TA.dtype) / batch.ranks
    fractions_A = counts_A.to(scores_TA.dtype) / tokens.clamp(min=1)
    balanced_A = balanced_loads(fractions_A, selection.num_true, kind, target_null_share)
    return logits_TA.shape[1] * (balanced_A * (scores_TA.sum(dim=0) / tokens_per_rank)).sum()


@torch.no_grad()
def selected_counts(selection: Selection, padding_mask_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Real tokens that selected each expert (A,), and all real tokens (0-d), int64 on the selection's device."""
    selected_TA, real_T = selection.selected_TA, selection.real_T
    if padding_mask_T is not None:
        real_T = real_T & ~padding_mask_T
        selected_TA = selected_TA & real_T.unsqueeze(1)
    return selected_TA.sum(dim=0), real_T.sum()


def balanced_loads(
    fractions_A: Tensor, num_true: int, kind: BalanceKind, target_null_share: float | None = None
) -> Tensor:
    """The loads that the balance loss weighs probabilities with: f (eq. 3), f~ (eq. 6) or those of two groups.

    `grouped` is ZEDA's loss: with f_E, f_Z the groups' loads (sums of f) and P_E, P_Z their probabilities (sums of P)
    it is `L = f_E P_E / (1 - r) + f_Z P_Z / r`. ZEDA writes `(N + N_Z w)/K (f_E P_E / N + f_Z P_Z / (N_Z w))` with
    `r = N_Z w / (N + N_Z w)`; this is the same times k. At f_Z = r k and P_Z = r it is k. As P_E = 1 - P_Z, its
    gradient in P_Z is `f_Z / r - f_E / (1 - r)`: zero at a null share of r, and towards it elsewhere.

    Args:
        fractions_A: Fraction of real tokens that select each expert (A,), summing to k.
        num_true: Number of true experts n.
        kind: `switch` keeps the loads, `null_averaged` replaces those of the null experts by their mean, `grouped`
            gives each expert its group's load, over the number of slots per (n + m) that the group should take.
        target_null_share: r of `grouped`; None is m / (n + m), where `grouped` gives each expert its group's mean.

    Returns:
        Loads (A,), with the same sum unless a target moves it.
    """
    experts = fractions_A.shape[0]
    if kind == "switch" or (experts == num_true and kind == "null_averaged"):
        return fractions_A
    true_E, null_N = fractions_A[:num_true], fractions_A[num_true:]
    if kind == "null_averaged":
        return torch.cat((true_E, null_N.mean().expand_as(null_N)))
    assert experts > num_true, "grouped needs null experts"
    share = (experts - num_true) / experts if target_null_share is None else target_null_share
    return torch.cat(
        (
            (true_E.sum() / (experts * (1.0 - share))).expand_as(true_E),
            (null_N.sum() / (experts * share)).expand_as(null_N),
        )
    )


def mean_probabilities(
    logits_TA: Tensor, padding_mask_T: Tensor | None = None, score_function: ScoreFunction = "softmax"
) -> Tensor:
    """Mean over real tokens of the softmax over all experts (eq. 5).

    Args:
        logits_TA: Router logits (T, A).
        padding_mask_T: Bool (T,), true for padding.
        score_function: `sigmoid` takes each token's sigmoid scores over their sum instead, as Megatron does.

    Returns:
        Probabilities (A,) that sum to 1, or to 0 if there is no real token.
    """
    scores_TA = _scores(logits_TA, padding_mask_T, score_function)
    return scores_TA.sum(dim=0) / _real_tokens(logits_TA, padding_mask_T)


def z_loss(logits_TA: Tensor, padding_mask_T: Tensor | None = None, tokens: Tensor | int | None = None) -> Tensor:
    """Mean over real tokens of the squared log-sum-exp of the logits (ST-MoE), which keeps logits small.

    Args:
        logits_TA: Router logits (T, A).
        padding_mask_T: Bool (T,), true for padding.
        tokens: What to divide by, where the mean is over more than these tokens; at least 1.

    Returns:
        0-d tensor; exactly 0, with zero gradients, if there is no real token.
    """
    squared_T = torch.logsumexp(_blank_padding(logits_TA, padding_mask_T), dim=1).square()
    if padding_mask_T is not None:
        squared_T = squared_T.masked_fill(padding_mask_T, 0.0)
    return squared_T.sum() / (_real_tokens(logits_TA, padding_mask_T) if tokens is None else tokens)


def annealed_coefficient(
    step: int, initial: float, final: float | None, anneal_steps: int, anneal: Literal["linear", "step"] = "linear"
) -> float:
    """Coefficient of an auxiliary loss at a training step.

    It moves on a line from `initial` at step 0 to `final` at step `anneal_steps` and stays there, or it is `initial`
    until then with `anneal` step. It is constant at `initial` if `final` is None or `anneal_steps` is 0, which switches
    annealing off. The paper anneals from tight to loose in a step, 0.02 in the first epoch and 0.0001 in the second
    (Table 5).

    Args:
        step: Optimizer steps done before this one.
        initial: Coefficient at step 0.
        final: Coefficient after annealing, or None.
        anneal_steps: Length of the annealing in optimizer steps.
        anneal: How it gets there.

    Returns:
        The coefficient.
    """
    assert anneal_steps >= 0, f"anneal_steps {anneal_steps}"
    if final is None or anneal_steps == 0:
        return initial
    if step >= anneal_steps:
        return final
    if anneal == "step":
        return initial
    return initial + (final - initial) * max(step, 0) / anneal_steps


def _real_tokens(logits_TA: Tensor, padding_mask_T: Tensor | None) -> Tensor | int:
    """Number of tokens to divide by: at least 1, and on the device where it depends on the mask."""
    if padding_mask_T is None:
        return max(logits_TA.shape[0], 1)
    return (~padding_mask_T).sum().clamp(min=1)


def _scores(logits_TA: Tensor, padding_mask_T: Tensor | None, score_function: ScoreFunction) -> Tensor:
    """Probabilities (T, A) of each real token, 0 for padding."""
    logits_TA = _blank_padding(logits_TA, padding_mask_T)
    if score_function == "softmax":
        scores_TA = torch.softmax(logits_TA, dim=1)
    else:
        sigmoid_TA = torch.sigmoid(logits_TA)
        scores_TA = sigmoid_TA / (sigmoid_TA.sum(dim=1, keepdim=True) + NO_SCORE)
    return _blank_padding(scores_TA, padding_mask_T)


def _blank_padding(values_TA: Tensor, padding_mask_T: Tensor | None) -> Tensor:
    """The values in fp32 or higher, 0 for padding: even NaN there reaches neither value nor gradient."""
    values_TA = values_TA.to(torch.promote_types(values_TA.dtype, torch.float32))
    return values_TA if padding_mask_T is None else values_TA.masked_fill(padding_mask_T.unsqueeze(1), 0.0)
