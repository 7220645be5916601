"""First values of the router's null rows.

Axes: T tokens, H hidden size, E true experts (n), N null experts (m), R rows (N, or 1 if all share one).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

NullInit = Literal["random", "copy", "shared"]


@torch.no_grad()
def initial_null_rows(
    kind: NullInit,
    true_weight_EH: Tensor,
    num_null: int,
    init_method: Callable[[Tensor], object],
    noise_std_ratio: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """First values of the rows that score null experts.

    * `random`: m rows drawn by `init_method`, as the true rows are.
    * `copy`: the true rows, repeated in order, plus a little noise. The paper copies without noise; then each
      null logit ties with that of its true expert, and top-k's tie-break decides how many true experts a
      token has.
    * `shared`: a single row by `init_method`, whose logit stands for every null expert (`expand_shared`).

    Args:
        kind: Which of the above.
        true_weight_EH: Router rows of the true experts (E, H); gives size, dtype and device.
        num_null: Number of null experts m.
        init_method: Fills a tensor in place.
        noise_std_ratio: Standard deviation of the copies' noise over that of `true_weight_EH`.
        generator: Source of the noise, on the weight's device; the default generator if None.

    Returns:
        Rows (m, H), or (1, H) for `shared`; (0, H) if m is 0.
    """
    hidden = true_weight_EH.shape[1]
    if num_null == 0:
        return true_weight_EH.new_empty((0, hidden))
    if kind == "copy":
        return _noisy_copies(true_weight_EH, num_null, noise_std_ratio, generator)
    rows_RH = true_weight_EH.new_empty((1 if kind == "shared" else num_null, hidden))
    init_method(rows_RH)
    return rows_RH


def expand_shared(null_logits_T1: Tensor, num_null: int) -> Tensor:
    """The one logit of all null experts, m times, so that top-k can take it up to m times.

    Args:
        null_logits_T1: Shared null logit (T, 1).
        num_null: Number of null experts m.

    Returns:
        View (T, m); the gradient of the shared logit is the sum over its m columns.
    """
    return null_logits_T1.expand(-1, num_null)


def _noisy_copies(
    true_weight_EH: Tensor, num_null: int, noise_std_ratio: float, generator: torch.Generator | None
) -> Tensor:
    """Copies whose order against their true row is as random as the order among themselves.

    With independent noise a true row, which has none, would be the best of r + 1 near-equal rows with
    probability 2^-r. Copies of one row share a draw, subtracted from their own: then it is 1 / (r + 1), as if
    the true row had been perturbed too.
    """
    num_true, hidden = true_weight_EH.shape
    source_N = torch.arange(num_null, device=true_weight_EH.device) % num_true
    draws = torch.randn(
        (num_true + num_null, hidden), generator=generator, dtype=torch.float32, device=true_weight_EH.device
    )
    noise_NH = (draws[num_true:] - draws[source_N]) / 2**0.5
    std = true_weight_EH.float().std(correction=0)
    return (true_weight_EH[source_N] + noise_std_ratio * std * noise_NH).to(true_weight_EH.dtype)
