"""Steps that change nothing, and whether what an engine trains is finite, in all ZeRO stages."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from adamoe_dist.model import canonical_buffers
from adamoe_dist.parallel.unsharded import UnshardedOptimizer


@contextlib.contextmanager
def discarding(optimizer: Any, device: torch.device) -> Iterator[None]:
    """Have the ``step()`` inside find a gradient norm that is not finite, so that it drops the gradients.

    Every optimizer then clears what it has gathered, in its own way, and leaves weights, masters, moments and counts of
    updates as they are. A dynamic loss scale would be lowered; it is put back. Collective with the step.
    """
    scaler = getattr(optimizer, "loss_scaler", None)
    before = {} if scaler is None else dict(vars(scaler))
    name, value = _nonfinite_norm(optimizer, device)
    setattr(optimizer, name, value)
    try:
        yield
    finally:
        delattr(optimizer, name)
        if scaler is not None:
            vars(scaler).update(before)


def _nonfinite_norm(optimizer: Any, device: torch.device) -> tuple[str, Callable[..., Any]]:
    """Return the method from which an optimizer has its norm, and what to put in its place."""
    if isinstance(optimizer, UnshardedOptimizer):
        return "_norm", lambda: math.nan
    nan = torch.tensor(math.nan, device=device)
    if isinstance(optimizer, BF16_Optimizer):
        return "get_grads_for_norm", lambda: ([nan], {})
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return "_get_norm_groups", lambda: [nan]
    assert isinstance(optimizer, DeepSpeedZeroOptimizer), f"no step of {type(optimizer).__name__} can be discarded"
    return "scaled_global_norm", lambda: nan


def forget_gradients(optimizer: Any) -> None:
    """Drop what a step that updated nothing left behind, after every step.

    Stages 1 and 2 with an offloaded optimizer in 16 bits sum fp32 gradients in a buffer that DeepSpeed drops after an
    update only: without this, one NaN would stay in the sums of all later steps.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.overflow:
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


@torch.no_grad()
def has_finite_weights(zero: Any, model: torch.nn.Module) -> bool:
    """Return whether all masters in ``zero`` and saved buffers of all ranks are finite. Collective over all ranks."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        masters = list(zero.fp32_partitioned_groups_flat)
    else:
        masters = [master for group in zero.optimizer.param_groups for master in group["params"]]
    held = [*masters, *canonical_buffers(model).values()]
    device = next(model.parameters()).device
    bad = torch.tensor(sum(not bool(tensor.isfinite().all()) for tensor in held), device=device)
    dist.all_reduce(bad)
    return int(bad) == 0
