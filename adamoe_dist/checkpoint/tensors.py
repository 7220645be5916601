"""The tensors of a checkpoint: their names, who holds which part, and Megatron-core's files.

Names: ``model.<parameter>`` master weights, ``model.<buffer>`` buffers that the model's output depends on,
``optimizer.exp_avg.<parameter>`` and ``optimizer.exp_avg_sq.<parameter>`` Adam's moments, all fp32 and whole; experts
of a layer are one tensor, stacked along axis 0 by global number. ``optimizer.step`` (1,) int64. ``rng.<device>``
(ranks, n) uint8.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from adamoe_dist.checkpoint.agreement import CheckpointError, describe
from adamoe_dist.checkpoint.index import CheckpointReader
from adamoe_dist.model import Part

OPTIMIZER_STEP = "optimizer.step"


def weight_key(name: str) -> str:
    """Return the name of a master weight."""
    return f"model.{name}"


def moment_key(name: str, moment: str) -> str:
    """Return the name of an Adam moment."""
    return f"optimizer.{moment}.{name}"


def random_key(device: str) -> str:
    """Return the name of the random states of a kind of device."""
    return f"rng.{device}"


def pieces_of(key: str, part: Part, turn: int = 0, value: Tensor | None = None) -> dict[str, ShardedTensor]:
    """Say which pieces of a whole fp32 tensor this rank holds.

    Args:
        key: the tensor's name.
        part: of the weight that the tensor is of, in shape.
        turn: which of the ranks that hold the same part writes it, counted on and around; spreads the work.
        value: the local tensor, needed on the rank that writes it; without it the descriptions have no data.

    Returns:
        The descriptions, each under a name of its own.
    """
    replica = (part.replica - turn) % part.replicas
    described = {}
    for number, piece in enumerate(part.pieces):
        sizes = [place.stop - place.start for place in piece.whole]
        offsets = [
            (axis, place.start // size, part.shape[axis] // size)
            for axis, (place, size) in enumerate(zip(piece.whole, sizes, strict=True))
        ]
        data = torch.empty(sizes, dtype=torch.float32, device="meta") if value is None else value[piece.local]
        sharded = ShardedTensor.from_rank_offsets(key, data.contiguous(), *offsets, replica_id=replica)
        described[_piece_name(key, number)] = sharded.without_data() if value is None else sharded
    return described


def joined(key: str, part: Part, loaded: dict[str, Tensor]) -> Tensor:
    """Return the local tensor of which :func:`read_tensors` read the pieces."""
    if len(part.pieces) == 1:
        return loaded[_piece_name(key, 0)]
    whole = torch.empty(part.parameter_shape, dtype=torch.float32)
    for number, piece in enumerate(part.pieces):
        whole[piece.local] = loaded[_piece_name(key, number)]
    return whole


def _piece_name(key: str, number: int) -> str:
    return key if number == 0 else f"{key}#{number}"


def part_by_rank(key: str, value: Tensor) -> ShardedTensor:
    """Describe a vector (n,) of each rank as row of a tensor (ranks, n)."""
    return ShardedTensor.from_rank_offsets(key, value.unsqueeze(0), (0, dist.get_rank(), dist.get_world_size()))


def replicated(key: str, value: Tensor, group: dist.ProcessGroup | None = None) -> ShardedTensor:
    """Describe a tensor that is the same on all ranks, or on those of a group."""
    return ShardedTensor.from_rank_offsets(key, value, replica_id=dist.get_rank(group))


class SynchronousWriter(TorchDistSaveShardedStrategy):
    """Writes Megatron-core's format in this process.

    Megatron-core's own strategy starts a manager process and forks a writer in every rank for each checkpoint, and
    waits for ever where one of them is killed. A rank that fails here makes all ranks fail.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's tensors to one file; rank 0 writes the index."""
        held: dict[str, list[ShardedTensor | ShardedObject]] = {}
        for part in sharded_state_dict.values():
            if is_main_replica(part.replica_id):
                held.setdefault(part.unique_key if isinstance(part, ShardedObject) else part.key, []).append(part)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(held, is_loading=False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )


def write_tensors(path: Path, tensors: dict[str, ShardedTensor]) -> None:
    """Write tensors to ``path``; all ranks call it together.

    Args:
        path: an existing directory that all ranks see.
        tensors: by name; those that another rank writes need no data.
    """
    try:
        dist_checkpointing.save(dict(tensors), str(path), sharded_strategy=SynchronousWriter("torch_dist", 1))
    except CheckpointException as problem:
        failures = {rank: failure[0] for rank, failure in problem.failures.items()}
        rank = dist.get_rank() if dist.get_rank() in failures else min(failures)
        if rank == dist.get_rank():
            raise failures[rank] from problem
        raise CheckpointError(f"rank {rank} failed writing tensors to {path}: {describe(failures[rank])}") from problem


def read_tensors(path: Path, tensors: dict[str, ShardedTensor]) -> dict[str, Tensor]:
    """Read this rank's parts of tensors, in CPU memory; all ranks call it together.

    Args:
        path: a checkpoint directory whose files were verified.
        tensors: descriptions by name; what they hold is overwritten.

    Raises:
        UserError: the index or a file with tensors is not what it should be.
    """
    held: dict[str, list[ShardedTensor]] = {}
    for part in tensors.values():
        held.setdefault(part.key, []).append(part)
    try:
        torch_checkpoint.load(
            mcore_to_pyt_state_dict(held, is_loading=True),
            storage_reader=CheckpointReader(path),
            planner=MCoreLoadPlanner(
                shapes_validation_sharded_tensors=list(tensors.values()),
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )
    except CheckpointException as problem:
        failure = min(problem.failures)
        raise problem.failures[failure][0] from problem
    return {key: part.data for key, part in tensors.items()}
