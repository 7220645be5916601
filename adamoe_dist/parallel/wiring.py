"""The check that ZeRO reduces every weight over the ranks that hold it, and no others.

Wrong wiring trains without an error message and to a wrong model; it is looked for once, before the first step.
"""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import deepspeed.utils.groups as deepspeed_groups
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from adamoe_dist.config import Layout, Resolved
from adamoe_dist.model import reduction_group
from adamoe_dist.parallel.groups import expert_group_name, replicas_group, stage_group
from adamoe_dist.parallel.optimizer import is_trained
from adamoe_dist.parallel.unsharded import UnshardedOptimizer


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
    """Return it; under stage 3 a weight is whole only inside DeepSpeed's context. Collective over who shards it."""
    with GatheredParameters([parameter]):
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
    _verify_order(engine, model)
    layout = resolved.layout
    is_stage_3 = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    has_work = is_stage_3 or any(map(is_trained, experts_of(model).values()))
    if bool(engine.has_moe_layers) != (layout.experts_are_apart and has_work):
        raise WiringError(f"engine.has_moe_layers={engine.has_moe_layers} with the layout {layout.explain()}")
    _verify_groups(engine, model)
    if layout.experts_are_apart:
        _verify_not_overwritten(model, before)


def verify_marks(model: torch.nn.Module, layout: Layout) -> None:
    """Check that each weight says what DeepSpeed and the gradient rules must know of it, before they read the marks.

    Raises:
        WiringError: naming the first expert that DeepSpeed would take for a dense weight, or the first weight whose
            gradient would be a part of one, or that the gradient norm would count wrongly.
    """
    if layout.tensor > 1:
        _verify_tensor_marks(model)
    name_of_group = expert_group_name(layout.expert) if layout.experts_are_apart else None
    for name, parameter in experts_of(model).items():
        if not getattr(parameter, "tensor_model_parallel", False):
            raise WiringError(f"{name} would count in the gradient norm on the first tensor-parallel rank only")
        if name_of_group is None:
            continue
        if getattr(parameter, "allreduce", True):
            raise WiringError(f"{name} is an expert but would be reduced over all data-parallel ranks")
        for mark in ("group_name", "ds_zero_partition_group_name"):
            if getattr(parameter, mark, None) != name_of_group:
                raise WiringError(f"{name} has {mark} {getattr(parameter, mark, None)!r}")


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
    after = checksum_experts(model)  # all before the first refusal: under stage 3 ranks gather weights together
    for name, parameter in experts_of(model).items():
        now, then = after[name], before[name]
        if abs(now - then) > 1e-2 * (abs(then) + _numel(parameter) ** 0.5):
            raise WiringError(
                f"{name} changed while the engine was built ({then} to {now}): overwritten by a broadcast"
            )


def _numel(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _verify_order(engine: Any, model: torch.nn.Module) -> None:
    """The ranks of a stage have the same weights in the same order: ZeRO joins them and cuts that by position."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mine = [(index, names.get(id(parameter), "")) for index, parameter in _trained(engine.optimizer)]
    everyone: list[Any] = [None] * stage_group().size()
    dist.all_gather_object(everyone, mine, group=stage_group())
    for rank, theirs in zip(dist.get_process_group_ranks(stage_group()), everyone, strict=True):
        if theirs != everyone[0]:
            pairs = zip_longest(everyone[0], theirs, fillvalue=(None, "nothing"))
            (_, first), (_, other) = next(pair for pair in pairs if pair[0] != pair[1])
            raise WiringError(f"rank {rank} gave its optimizer {other} where others of its stage gave {first}")


def _verify_groups(engine: Any, model: torch.nn.Module) -> None:
    """Each parameter is in one optimizer group, and is reduced over the ranks that hold the same weights."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if is_trained(parameter)}
    for index, parameter, group in _reductions(engine):
        name = names.pop(id(parameter), None)
        if name is None:
            raise WiringError(f"optimizer group {index} holds a weight twice or one the model does not have")
        over, wanted = (list(dist.get_process_group_ranks(ranks)) for ranks in (group, reduction_group(parameter)))
        if over != wanted:
            raise WiringError(f"{name} is reduced over ranks {over}, must be over {wanted}")
    if names:
        raise WiringError(f"no optimizer group holds {next(iter(names.values()))}")


def _trained(optimizer: Any) -> Iterator[tuple[int, torch.nn.Parameter]]:
    """Yield the parameters that the optimizer has, each after its group's index."""
    if isinstance(optimizer, UnshardedOptimizer):
        groups = optimizer.parameter_groups
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups = optimizer.fp16_groups
    else:
        groups = getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups
    for index, group in enumerate(groups):
        for parameter in group:
            yield index, parameter


def _reductions(engine: Any) -> Iterator[tuple[int, torch.nn.Parameter, dist.ProcessGroup]]:
    """Yield each parameter that the optimizer has, its group's index, and the ranks that DeepSpeed reduces it over."""
    optimizer = engine.optimizer
    for index, parameter in _trained(optimizer):
        if isinstance(optimizer, UnshardedOptimizer):
            group = _group_of_stage_0(parameter)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            group = _group_of_stage_3(optimizer, parameter)
        else:
            group = optimizer.real_dp_process_group[index]
        yield index, parameter, group


def _group_of_stage_0(parameter: Any) -> dist.ProcessGroup:
    if is_moe_param(parameter):
        return deepspeed_groups._get_expert_data_parallel_group(parameter.group_name)
    return deepspeed_groups._get_sequence_data_parallel_group()


def _group_of_stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3, parameter: Any) -> dist.ProcessGroup:
    """Return the ranks that shard a weight; they reduce it, and the mean is over all data-parallel ranks if marked."""
    averaged_over = optimizer._gradient_averaging_world_size([parameter], parameter.ds_process_group.size())
    if averaged_over != replicas_group().size():
        raise WiringError(f"a weight of shape {tuple(parameter.ds_shape)} is averaged over {averaged_over} ranks")
    return parameter.ds_process_group
