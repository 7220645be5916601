"""What a checkpoint will hold, copied to CPU memory so that training can go on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.checkpoint import tensors as names
from adamoe_dist.checkpoint.agreement import CheckpointError, gathered
from adamoe_dist.checkpoint.balance import assign_writers
from adamoe_dist.checkpoint.zero import ZeroState
from adamoe_dist.model import Part, canonical_buffers
from adamoe_dist.parallel import TrainingEngine, stage_group


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run.

    Attributes:
        step: the number of steps done.
        tensors: this rank's parts by name; those that it writes have data, which nothing else refers to.
        state: what else the run needs to continue, plain JSON values.
        config: the resolved tree.
        layout: how the run is cut, for the manifest.
    """

    step: int
    tensors: dict[str, ShardedTensor]
    state: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, Any]

    @property
    def written_bytes(self) -> int:
        """Bytes of the tensors that this rank writes."""
        return sum(part.data.nbytes for part in self.tensors.values() if part.data is not None)


def take_snapshot(
    step: int, engine: TrainingEngine, state: dict[str, Any], config: dict[str, Any], layout: dict[str, Any]
) -> Snapshot:
    """Copy an engine's state between two steps; all ranks call it together.

    Raises:
        CheckpointError: a buffer that must be the same on all ranks is not.
    """
    _require_equal_buffers(engine)
    return Snapshot(step, collect_tensors(engine), state, config, layout)


def collect_tensors(engine: TrainingEngine) -> dict[str, ShardedTensor]:
    """Return the tensors of a checkpoint; data are copies in CPU memory, on the rank that writes each."""
    zero = ZeroState(engine)
    collected: dict[str, ShardedTensor] = {}
    entries = list(_entries(zero))
    for (key, name, moment), writer in zip(entries, _writers(zero, entries), strict=True):
        part = zero.parts[name]
        value = zero.weight(name) if moment is None else zero.moment(name, moment)
        own = _owned(value, zero.is_whole or name not in zero.trained) if part.replica == writer else None
        collected.update(names.pieces_of(key, part, writer, own))
    for name, buffer in zero.buffers.items():
        key = names.weight_key(name)
        collected[key] = names.replicated(key, _owned(buffer, True), stage_group())
    if zero.moments:
        collected[names.OPTIMIZER_STEP] = names.replicated(names.OPTIMIZER_STEP, torch.tensor([zero.step]))
    for device, random_state in platform.random_states().items():
        key = names.random_key(device)
        collected[key] = names.part_by_rank(key, random_state)
    return collected


Entry = tuple[str, str, str | None]
"""A tensor of the checkpoint, the weight that it is of, and the moment, None for the weight itself."""


def _entries(zero: ZeroState) -> Iterator[Entry]:
    for name in zero.parts:
        yield names.weight_key(name), name, None
        for moment in zero.moments if name in zero.trained else ():
            yield names.moment_key(name, moment), name, moment


def _writers(zero: ZeroState, entries: list[Entry]) -> list[int]:
    """Spread the writing over the ranks that hold the same parts: dense weights and experts may have different ones."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for index, (_, name, _) in enumerate(entries):
        parameter = zero.parameters[name]
        marks = ("is_expert", "tensor_model_parallel")
        is_expert, is_split = (bool(getattr(parameter, mark, False)) for mark in marks)
        kinds.setdefault((is_expert, is_split), []).append(index)
    writers = [0] * len(entries)
    for indices in kinds.values():
        parts: list[Part] = [zero.parts[entries[index][1]] for index in indices]
        sizes = [4 * torch.Size(part.parameter_shape).numel() for part in parts]
        for index, writer in zip(indices, assign_writers(sizes, parts[0].replicas), strict=True):
            writers[index] = writer
    return writers


def _owned(value: Tensor, is_shared: bool) -> Tensor:
    """Return a copy in CPU memory that training will not change; a value that was gathered for us is one already."""
    value = value.detach()
    return value.clone() if is_shared and value.device.type == "cpu" else value.cpu()


def _require_equal_buffers(engine: TrainingEngine) -> None:
    """Refuse, on every rank, buffers that differ among the ranks: one rank's would be saved for all."""
    buffers = canonical_buffers(engine.model)
    held = {name: hashlib.sha256(buffer.cpu().numpy().tobytes()).hexdigest() for name, buffer in buffers.items()}
    first: dict[str, tuple[int, str]] = {}
    for rank, other in enumerate(gathered(held)):
        for name, digest in other.items():
            before, expected = first.setdefault(name, (rank, digest))
            if digest != expected:
                raise CheckpointError(
                    f"buffer {name} of rank {rank} is not that of rank {before}; all ranks must hold the same"
                )
