"""The rule that holds the mean number of true experts a token uses: a bias on selection, moved once a step.

Axes: E true experts (n).
"""

from typing import Literal

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]


@torch.no_grad()
def updated_bias(
    bias_E: Tensor, counts_E: Tensor, real_tokens: Tensor, top_k: int, target_load: float, mu: float
) -> Tensor:
    """Move the selection bias of the true experts by LongCat-Flash's rule (arXiv 2509.01322).

    ``b_i += mu (K_e / (K n) - T_i / (K T))``, where T_i of T tokens chose true expert i, K is top_k and K_e the target
    load. The null experts' bias is 0 and stays so. The rule is an integral controller: it rests only where every true
    expert has the same load and their sum is the target.

    Args:
        bias_E: Bias now (E,), fp32.
        counts_E: T_i over the global batch (E,), int64.
        real_tokens: T, tokens of the global batch that are not padding, 0-d; with 0 nothing moves.
        top_k: Slots a token K.
        target_load: K_e.
        mu: Gain of this step.

    Returns:
        The new bias (E,), fp32; computed in fp64, so that equal counts give equal bits on every rank.
    """
    wanted_share = target_load / (top_k * bias_E.shape[0])
    share_E = counts_E.double() / (top_k * real_tokens.clamp(min=1)).double()
    move_E = mu * (wanted_share - share_E) * (real_tokens > 0)
    return (bias_E.double() + move_E).to(bias_E.dtype)


def decayed_rate(rate: float, step: int, decay_steps: int) -> float:
    """Return the gain's decay: ``rate / (1 + step / decay_steps)``, half after `decay_steps` and never 0.

    LongCat says that mu decays, not how. Early steps must follow a router that still moves fast; later ones should
    average the noise of single batches away, yet go on following.
    """
    return rate / (1.0 + step / decay_steps)


def score_gain(score: Score, num_columns: int) -> float:
    """Return mu for a rate of 1: what makes one rate fit every number of experts and kind of score.

    A slot share is about 1 / (n + m) and a score moves with its logit by 1 / (n + m) (softmax, even scores) or 1 / 4
    (sigmoid at 0). mu is the ratio of the two, so that an expert that is off by one even share has its bias moved by
    what `rate` on its logit would do. For softmax it is 1: LongCat's mu is the rate itself.
    """
    slope = 1.0 / num_columns if score == "softmax" else 0.25
    return slope * num_columns
