"""The rule that holds the mean number of true experts a token uses: a bias on selection, moved once a step.

Axes: T tokens, E true experts (n), A = true and null experts, M bins of margins.
"""

import torch
from torch import Tensor

from adamoe_dist.routing.selection import ScoreFunction

MARGIN_BINS = 96
BINS_PER_OCTAVE = 4
LARGEST_EXPONENT = 2
NEAR_FRACTION = 0.25
EVENNESS = 0.2


@torch.no_grad()
def updated_bias(
    bias_E: Tensor,
    counts_E: Tensor,
    real_tokens: Tensor,
    top_k: int,
    target_load: float,
    mu: Tensor | float,
    evenness: float = EVENNESS,
) -> Tensor:
    """Move the selection bias of the true experts by LongCat-Flash's rule (arXiv 2509.01322).

    ``b_i += mu (K_e / (K n) - T_i / (K T))``, where T_i of T tokens chose true expert i, K is top_k and K_e the target
    load. The null experts' bias is 0 and stays so. The rule is an integral controller: it rests only where every true
    expert has the same load and their sum is the target.

    `evenness` weakens it between experts: the part of an expert's error that differs from the mean error moves its bias
    with `evenness` x mu. 1 is LongCat's rule. One mu for both is too weak for the load or, where some experts' scores
    lie much denser than others', so strong that single experts swing from full to empty.

    Args:
        bias_E: Bias now (E,), fp32.
        counts_E: T_i over the global batch (E,), int64.
        real_tokens: T, tokens of the global batch that are not padding, 0-d; with 0 nothing moves.
        top_k: Slots a token K.
        target_load: K_e.
        mu: Gain of this step; see :func:`gain`.
        evenness: Gain between experts over that of their mean.

    Returns:
        The new bias (E,), fp32; computed in fp64, so that equal counts give equal bits on every rank.
    """
    wanted_share = target_load / (top_k * bias_E.shape[0])
    share_E = counts_E.double() / (top_k * real_tokens.clamp(min=1)).double()
    error_E = (wanted_share - share_E) * (real_tokens > 0)
    move_E = mu * (error_E.mean() + evenness * (error_E - error_E.mean()))
    return (bias_E.double() + move_E).to(bias_E.dtype)


@torch.no_grad()
def margins(scores_TA: Tensor, selected_TA: Tensor, num_true: int) -> Tensor:
    """Return how far the true experts' scores would have to move together to change each token's load by one.

    Args:
        scores_TA: What the selection was made by (T, A): scores with bias.
        selected_TA: Bool, what was selected; all false for padding.
        num_true: True experts n; the first columns.

    Returns:
        Margins (T,), at least 0: the smaller of the moves up and down; infinite for padding.
    """
    selected = scores_TA.masked_fill(~selected_TA, torch.inf)
    others = scores_TA.masked_fill(selected_TA, -torch.inf)
    up_T = selected[:, num_true:].amin(dim=1) - others[:, :num_true].amax(dim=1)
    down_T = selected[:, :num_true].amin(dim=1) - others[:, num_true:].amax(dim=1)
    margins_T = torch.minimum(up_T, down_T).clamp(min=0)
    return margins_T.masked_fill(~selected_TA.any(dim=1), torch.inf)


@torch.no_grad()
def margin_counts(margins_T: Tensor) -> Tensor:
    """Count margins by size (M,), int64, so that ranks and micro-batches can be added exactly.

    Bin j holds the margins up to ``margin_edges()[j]`` that are in no earlier bin; padding (infinite) is in none.
    """
    edges_M = margin_edges(margins_T.device).to(margins_T.dtype)
    bins_T = torch.bucketize(margins_T, edges_M)
    return torch.bincount(bins_T, minlength=MARGIN_BINS + 1)[:MARGIN_BINS]


def margin_edges(device: torch.device | None = None) -> Tensor:
    """Return the upper edges of the bins (M,), fp64: powers of 2^(1/4) from 2^-22 to 4."""
    exponents = torch.arange(1 - MARGIN_BINS, 1, dtype=torch.float64, device=device) / BINS_PER_OCTAVE
    return torch.exp2(exponents + LARGEST_EXPONENT)


@torch.no_grad()
def load_slope(counts_M: Tensor, largest_margin: float) -> Tensor:
    """Return how fast the mean load rises with a common move of the true experts' scores, 0-d fp64.

    The density of margins at 0, from the quarter of the tokens that have the smallest ones: that part of the tokens
    over twice the margin that it reaches to, since half of them change by a move up and half by one down.

    Args:
        counts_M: Margins of the global batch by size (M,).
        largest_margin: The slope is not taken to be less than it is with a quarter of the tokens within this: in the
            first steps all tokens can look alike to a router, so that none changes until all do.
    """
    edges_M, total = margin_edges(counts_M.device), counts_M.sum().clamp(min=1)
    within_M = counts_M.cumsum(0).double() / total.double()
    last = (within_M < NEAR_FRACTION).sum().clamp(max=MARGIN_BINS - 1)
    slope = within_M[last] / (2.0 * edges_M[last])
    return slope.clamp(min=NEAR_FRACTION / (2.0 * largest_margin))


def score_unit(score_function: ScoreFunction, num_columns: int) -> float:
    """Return what one logit moves a score by where all scores are even: 1 / (n + m), or 1 / 4 for a sigmoid at 0."""
    return 1.0 / num_columns if score_function == "softmax" else 0.25


def gain(rate: float, slope: Tensor, num_true: int, top_k: int) -> Tensor:
    """Return mu of a step, 0-d fp64: with a rate of 1 it would undo an error of the load at once.

    How far a bias must go for a given load depends on the number of experts, the kind of score and how far the router
    has learnt to tell tokens apart; so mu is measured, not set. An error e of the load is
    ``e / (K n)`` of the slots in each true expert on average, the bias moves by mu times that, and the load by
    `slope` times the bias: :func:`load_slope`.
    """
    return rate * top_k * num_true / slope


def decayed_rate(rate: float, step: int, decay_steps: int) -> float:
    """Return ``rate / (1 + step / decay_steps)``: half after `decay_steps`, and never 0.

    LongCat says that mu decays, not how. Early steps must follow a router that still moves fast; later ones should
    average the noise of single batches away, yet go on following.
    """
    return rate / (1.0 + step / decay_steps)
