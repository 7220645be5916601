"""The check that ZeRO reduces every weight over the ranks that hold it, and no others.

Wrong wiring trains without an error message and to a wrong model; it is looked for once, before the first step.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from adamoe_dist.config import Layout, Resolved
from adamoe_dist.model import is_tied_copy
from adamoe_dist.parallel.groups import expert_group_name, replicas_group


class WiringError(RuntimeError):
    """DeepSpeed's view of the experts differs from Megatron's: training would go wrong silently."""


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the true experts' weights by name."""
    return {name: p for name, p in model.named_parameters() if getattr(p, "is_expert", False)}


@torch.no_grad()
def checksum_experts(model: torch.nn.Module) -> dict[str, float]:
    """Return a number for each expert weight of this rank that a broadcast from another rank would change."""
    return {name: _checksum(parameter) for name, parameter in experts_of(model).items()}


def _checksum(parameter: torch.Tensor) -> float:
    flat = parameter.detach().double().flatten().cpu()
    return float((flat * torch.linspace(1.0, 2.0, flat.numel(), dtype=torch.float64)).sum())


def verify_wiring(engine: Any, model: torch.nn.Module, resolved: Resolved, before: dict[str, float]) -> None:
    """Check an engine right after it was built.

    Args:
        engine: DeepSpeed's engine.
        model: the module inside.
        resolved: the degrees.
        before: :func:`checksum_experts` of the model before the engine was built.

    Raises:
        WiringError: naming the first weight or group that is wrong.
    """
    layout = resolved.layout
    if bool(engine.has_moe_layers) != layout.experts_are_apart:
        raise WiringError(f"engine.has_moe_layers={engine.has_moe_layers} with the layout {layout.explain()}")
    if layout.experts_are_apart:
        _verify_not_overwritten(model, before)
    _verify_groups(engine, model, layout)


def verify_marks(model: torch.nn.Module, layout: Layout) -> None:
    """Check that each weight says what DeepSpeed and the gradient rules must know of it, before they read the marks.

    Raises:
        WiringError: naming the first expert that DeepSpeed would take for a dense weight, or the first weight whose
            gradient would be a part of one.
    """
    if layout.tensor > 1:
        _verify_tensor_marks(model)
    if not layout.experts_are_apart:
        return
    for name, parameter in experts_of(model).items():
        if getattr(parameter, "allreduce", True):
            raise WiringError(f"{name} is an expert but would be reduced over all data-parallel ranks")
        if getattr(parameter, "group_name", None) != expert_group_name(layout.expert):
            raise WiringError(f"{name} has group_name {getattr(parameter, 'group_name', None)!r}")


def _verify_tensor_marks(model: torch.nn.Module) -> None:
    """Each weight is cut over the tensor-parallel ranks, or summed over them, and not both.

    A weight that every tensor-parallel rank holds sees only that rank's part of the sequence.
    """
    for name, parameter in model.named_parameters():
        is_cut = bool(getattr(parameter, "tensor_model_parallel", False))
        is_summed = bool(getattr(parameter, "sequence_parallel", False))
        if is_cut == is_summed:
            both = "both" if is_cut else "neither"
            raise WiringError(f"{name} is marked as {both} cut over and summed over tensor-parallel ranks")


def _verify_not_overwritten(model: torch.nn.Module, before: dict[str, float]) -> None:
    for name, parameter in experts_of(model).items():
        now, then = _checksum(parameter), before[name]
        if abs(now - then) > 1e-2 * (abs(then) + parameter.numel() ** 0.5):
            raise WiringError(
                f"{name} changed while the engine was built ({then} to {now}): overwritten by a broadcast"
            )


def _verify_groups(engine: Any, model: torch.nn.Module, layout: Layout) -> None:
    """Each parameter is in one ZeRO group, whose ranks are those that hold the same weights."""
    optimizer = engine.optimizer
    groups = getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups
    over_dense = dist.get_process_group_ranks(replicas_group())
    over_experts = dist.get_process_group_ranks(parallel_state.get_expert_data_parallel_group())
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad and not is_tied_copy(p)}
    for index, group in enumerate(groups):
        reduced_over = dist.get_process_group_ranks(optimizer.real_dp_process_group[index])
        for parameter in group:
            name = names.pop(id(parameter), None)
            if name is None:
                raise WiringError(f"optimizer group {index} holds a weight twice or one the model does not have")
            is_sharded = getattr(parameter, "is_expert", False) and layout.experts_are_apart
            wanted = over_experts if is_sharded else over_dense
            if list(reduced_over) != list(wanted):
                raise WiringError(f"{name} is sharded over ranks {list(reduced_over)}, must be over {list(wanted)}")
    if names:
        raise WiringError(f"no optimizer group holds {next(iter(names.values()))}")
