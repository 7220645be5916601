"""Auxiliary losses of the router, without their coefficients.

Axes: T tokens, E true experts (n), N null experts (m), A = E + N (true experts first).
"""

from typing import Literal

import torch
from torch import Tensor

from adamoe_dist.routing.selection import Selection

BalanceKind = Literal["null_averaged", "switch"]


def balance_loss(
    logits_TA: Tensor,
    selection: Selection,
    kind: BalanceKind,
    padding_mask_T: Tensor | None = None,
) -> Tensor:
    """Load-balancing loss over true and null experts: `(n + m) * sum_i f_i P_i`.

    `f_i` is the fraction of real tokens that select expert i (eq. 4) and `P_i` the mean over real tokens of
    its softmax over all n + m logits (eq. 5). `null_averaged` is eq. 6: the loads of the null experts are
    replaced by their mean, so that nothing balances one null expert against another. `switch` is eq. 3 over
    n + m distinct experts. Without null experts the two are equal.

    At balance the value is k, as in the paper, since the f_i sum to k. Megatron's convention is 1: the same
    coefficient acts here k times as strongly.

    The loads have no gradient; the probabilities have.

    Args:
        logits_TA: Router logits (T, A); the loss is computed in fp32, or in their precision if it is higher.
        selection: The selection made from these logits.
        kind: Which loads are balanced.
        padding_mask_T: Bool (T,), true for padding, which counts in neither load nor probability. The mask
            given to `select`.

    Returns:
        0-d tensor; exactly 0, with zero gradients, if there is no real token.
    """
    selected_TA = selection.selected_TA
    if padding_mask_T is not None:
        selected_TA = selected_TA & ~padding_mask_T.unsqueeze(1)
    probs_A = mean_probabilities(logits_TA, padding_mask_T)
    real_tokens = _real_tokens(logits_TA, padding_mask_T)
    fractions_A = selected_TA.sum(dim=0).to(probs_A.dtype) / real_tokens
    balanced_A = balanced_loads(fractions_A, selection.num_true, kind)
    return logits_TA.shape[1] * (balanced_A * probs_A).sum()


def balanced_loads(fractions_A: Tensor, num_true: int, kind: BalanceKind) -> Tensor:
    """The loads that the balance loss weighs probabilities with: f (eq. 3) or f~ (eq. 6).

    Args:
        fractions_A: Fraction of real tokens that select each expert (A,), summing to k.
        num_true: Number of true experts n.
        kind: `switch` keeps the loads, `null_averaged` replaces those of the null experts by their mean.

    Returns:
        Loads (A,) with the same sum.
    """
    if kind == "switch" or fractions_A.shape[0] == num_true:
        return fractions_A
    null_N = fractions_A[num_true:]
    return torch.cat((fractions_A[:num_true], null_N.mean().expand_as(null_N)))


def mean_probabilities(logits_TA: Tensor, padding_mask_T: Tensor | None = None) -> Tensor:
    """Mean over real tokens of the softmax over all experts (eq. 5).

    Args:
        logits_TA: Router logits (T, A).
        padding_mask_T: Bool (T,), true for padding.

    Returns:
        Probabilities (A,) that sum to 1, or to 0 if there is no real token.
    """
    probs_TA = torch.softmax(_blank_padding(logits_TA, padding_mask_T), dim=1)
    return _blank_padding(probs_TA, padding_mask_T).sum(dim=0) / _real_tokens(logits_TA, padding_mask_T)


def z_loss(logits_TA: Tensor, padding_mask_T: Tensor | None = None) -> Tensor:
    """Mean over real tokens of the squared log-sum-exp of the logits (ST-MoE), which keeps logits small.

    Args:
        logits_TA: Router logits (T, A).
        padding_mask_T: Bool (T,), true for padding.

    Returns:
        0-d tensor; exactly 0, with zero gradients, if there is no real token.
    """
    squared_T = torch.logsumexp(_blank_padding(logits_TA, padding_mask_T), dim=1).square()
    if padding_mask_T is not None:
        squared_T = squared_T.masked_fill(padding_mask_T, 0.0)
    return squared_T.sum() / _real_tokens(logits_TA, padding_mask_T)


def annealed_coefficient(step: int, initial: float, final: float | None, anneal_steps: int) -> float:
    """Coefficient of an auxiliary loss at a training step.

    It moves on a line from `initial` at step 0 to `final` at step `anneal_steps` and stays there. It is
    constant at `initial` if `final` is None or `anneal_steps` is 0, which switches annealing off. The paper
    anneals from tight to loose, 0.02 in the first epoch and 0.0001 in the second (Table 5).

    Args:
        step: Optimizer steps done before this one.
        initial: Coefficient at step 0.
        final: Coefficient after annealing, or None.
        anneal_steps: Length of the annealing in optimizer steps.

    Returns:
        The coefficient.
    """
    assert anneal_steps >= 0, f"anneal_steps {anneal_steps}"
    if final is None or anneal_steps == 0:
        return initial
    if step >= anneal_steps:
        return final
    return initial + (final - initial) * max(step, 0) / anneal_steps


def _real_tokens(logits_TA: Tensor, padding_mask_T: Tensor | None) -> Tensor | int:
    """Number of tokens to divide by: at least 1, and on the device where it depends on the mask."""
    if padding_mask_T is None:
        return max(logits_TA.shape[0], 1)
    return (~padding_mask_T).sum().clamp(min=1)


def _blank_padding(values_TA: Tensor, padding_mask_T: Tensor | None) -> Tensor:
    """The values in fp32 or higher, 0 for padding: even NaN there reaches neither value nor gradient."""
    values_TA = values_TA.to(torch.promote_types(values_TA.dtype, torch.float32))
    return values_TA if padding_mask_T is None else values_TA.masked_fill(padding_mask_T.unsqueeze(1), 0.0)
