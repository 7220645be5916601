"""What a rank's memory is taken up by, counted from the tensors that are there."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adamoe_dist.parallel.engine import TrainingEngine
from adamoe_dist.parallel.unsharded import UnshardedOptimizer

_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
"""Where stages 1 and 2, stage 1 under bf16, and stage 3 keep their fp32 weights."""


@dataclass(frozen=True, kw_only=True)
class LiveBytes:
    """Bytes of tensors by what they are for, those in CPU memory included.

    ``gradients`` are all tensors that are neither weights nor the optimizer's: between the last backward pass and the
    step gradients and DeepSpeed's buffers for them. fp32 weights that are their own masters count as weights.
    """

    weights: int
    gradients: int
    optimizer: int


def live_bytes(engine: TrainingEngine) -> LiveBytes:
    """Count the storages of all tensors of this process; slow. No other engine may be alive."""
    gc.collect()
    parameters: list[Any] = list(engine.model.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    weights = _storages([*parameters, *shards])
    optimizer = _storages(_optimizer_tensors(engine)).keys() - weights.keys()
    every = _storages([*_all_tensors(), *(p.grad for p in parameters if p.grad is not None)])
    every.update(weights)
    rest = every.keys() - weights.keys() - optimizer
    return LiveBytes(
        weights=sum(weights.values()),
        gradients=sum(every[storage] for storage in rest),
        optimizer=sum(every[storage] for storage in optimizer),
    )


def _optimizer_tensors(engine: TrainingEngine) -> list[Tensor]:
    zero: Any = engine.deepspeed.optimizer
    found: list[Any] = [value for state in zero.optimizer.state.values() for value in state.values()]
    found += [tensor for attribute in _MASTERS for tensor in getattr(zero, attribute, [])]
    if isinstance(zero, UnshardedOptimizer):
        found += [zero.master(parameter) for parameter in zero.parameters]
    return [value for value in found if isinstance(value, Tensor)]


def _all_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, int], int]:
    """Return the size of each storage that the tensors are in."""
    strided = (t for t in tensors if t.layout == torch.strided and t.device.type != "meta")
    storages = ((t.device, t.untyped_storage()) for t in strided)
    return {(device, storage.data_ptr()): storage.nbytes() for device, storage in storages if storage.nbytes()}
