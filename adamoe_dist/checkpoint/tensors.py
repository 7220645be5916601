"""The tensors of a checkpoint: their names, who holds which part, and Megatron-core's files.

Names: ``model.<parameter>`` master weights, ``model.<buffer>`` buffers that the model's output depends on,
``optimizer.exp_avg.<parameter>`` and ``optimizer.exp_avg_sq.<parameter>`` Adam's moments, all fp32 and whole; experts
of a layer are one tensor, stacked along axis 0 by global number. ``optimizer.step`` (1,) int64. ``rng.<device>``
(ranks, n) uint8.
"""

from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from adamoe_dist.checkpoint.agreement import CheckpointError, describe
from adamoe_dist.checkpoint.index import CheckpointReader
from adamoe_dist.checkpoint.records import Block
from adamoe_dist.model import Part

COMMON = "common.pt"
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


def pieces_of(key: str, part: Part, writer: int = 0, value: Tensor | None = None) -> dict[str, ShardedTensor]:
    """Say which pieces of a whole fp32 tensor this rank holds.

    Args:
        key: the tensor's name.
        part: of the weight that the tensor is of, in shape.
        writer: which of the ranks that hold the same part writes it.
        value: the local tensor, needed on the rank that writes it; without it the descriptions have no data.

    Returns:
        The descriptions, each under a name of its own.
    """
    replica = (part.replica - writer) % part.replicas
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


def check_coverage(tensors: dict[str, ShardedTensor]) -> None:
    """Check that the ranks' parts make up each whole tensor once; all ranks call it together.

    Raises:
        CheckpointingException: some element would be written twice or not at all; on rank 0.
    """
    _, everyone = determine_global_metadata(dict(tensors))
    validate_sharding_integrity(everyone)


def write_tensors(path: Path, tensors: dict[str, ShardedTensor], group: dist.ProcessGroup | None = None) -> None:
    """Write tensors to ``path`` in Megatron-core's format; all ranks call it together.

    It runs in this process and has no collective but on ``group``, so that it may run beside training. Megatron-core's
    own strategy starts a manager process and forks a writer in every rank for each checkpoint, and waits for ever where
    one of them is killed.

    Args:
        path: an existing directory that all ranks see.
        tensors: by name, as :func:`check_coverage` accepts; those that another rank writes need no data.
        group: of all ranks; None: the default one.
    """
    held: dict[str, list[Any]] = {}
    for part in tensors.values():
        if is_main_replica(part.replica_id):
            held.setdefault(part.key, []).append(part)
    try:
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(held, is_loading=False),
            storage_writer=_Writer(path, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
            process_group=group,
        )
    except CheckpointException as problem:
        failures = {rank: failure[0] for rank, failure in problem.failures.items()}
        rank = dist.get_rank() if dist.get_rank() in failures else min(failures)
        if rank == dist.get_rank():
            raise failures[rank] from problem
        raise CheckpointError(f"rank {rank} failed writing tensors to {path}: {describe(failures[rank])}") from problem


class _Writer(torch_checkpoint.FileSystemWriter):
    """Says what the disk said: torch's zip writer replaces that by a remark on its own positions."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's tensors."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as problem:
            raise beneath(problem) from None


def beneath(problem: BaseException) -> BaseException:
    """Return the error of the operating system that an error followed from, or the error itself where there is none."""
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or problem


def write_block(file: IO[bytes], name: str, offsets: tuple[int, ...], value: Tensor) -> Block:
    """Append one block of a tensor to an open file as torch's writer would; return its place for the index.

    Args:
        file: open for writing.
        name: of the file, in the checkpoint's directory.
        offsets: of the block in the whole tensor.
        value: the block; of a larger storage only its own numbers are written.

    Raises:
        OSError: what the disk said.
    """
    value = value.contiguous()
    if value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()
    start = file.tell()
    try:
        torch.save(value, file)
    except RuntimeError as problem:
        raise beneath(problem) from None
    return Block(offsets, tuple(value.shape), name, start, file.tell() - start)


def write_format(path: Path) -> None:
    """Write the two files by which Megatron-core knows its format; the second is of what is not a tensor: nothing."""
    save_config(CheckpointingConfig("torch_dist"), str(path))
    torch.save({}, path / COMMON)


def read_tensors(reader: CheckpointReader, tensors: dict[str, ShardedTensor]) -> dict[str, Tensor]:
    """Read this rank's parts of tensors, in CPU memory; all ranks call it together.

    Args:
        reader: of a checkpoint directory whose files were verified.
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
            storage_reader=reader,
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
