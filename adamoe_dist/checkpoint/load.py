"""Loading into any layout: every rank reads its part of the whole tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.checkpoint import tensors as names
from adamoe_dist.checkpoint.agreement import agreed, gathered
from adamoe_dist.checkpoint.index import CheckpointReader, read_shapes
from adamoe_dist.checkpoint.manifest import read_manifest, read_state, verify_files
from adamoe_dist.checkpoint.merged import MergedReader
from adamoe_dist.checkpoint.zero import ZeroState
from adamoe_dist.errors import UserError
from adamoe_dist.model import Part, is_adapter
from adamoe_dist.parallel import TrainingEngine, stage_group

_BATCH_BYTES = 1 << 29

OFTEN = "the model or the optimizer is another one than the checkpoint's"


def load_checkpoint(path: Path, engine: TrainingEngine) -> dict[str, Any]:
    """Continue from a checkpoint; all ranks call it together.

    Weights, moments and the step count are restored, whatever the number of ranks, the degrees, the ZeRO stage and the
    precision that they were saved with. Random states are restored where the number of ranks is the same.

    Args:
        path: the checkpoint directory.
        engine: of the same model and optimizer; it may have done steps or not.

    Returns:
        The state that was given to ``save_checkpoint``.

    Raises:
        UserError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    shapes = _verified_shapes(path)
    zero = ZeroState(engine)
    entries = [*_weights(zero), *_buffers(zero), *_moments(zero)]
    _check_shapes(path, entries, shapes, ("model.", "optimizer."))
    with agreed(f"reading {path}"):
        state = read_state(path)
    _read(path, [*entries, *_random_states(shapes)])
    _finish(zero, engine)
    return state


def load_weights(path: Path, engine: TrainingEngine) -> list[str]:
    """Take a checkpoint's weights and buffers, and nothing else; all ranks call it together.

    Where the checkpoint has low-rank adapters and the engine's model has none, they are taken into their weights.

    Args:
        path: the checkpoint directory.
        engine: of the same model.

    Returns:
        The buffers that the checkpoint's model did not have, all or none of the engine's: they stay as they are.

    Raises:
        UserError: a file is missing or damaged, or a weight is missing, unexpected or of another shape.
    """
    shapes = _verified_shapes(path)
    zero = ZeroState(engine)
    is_without = not any(names.weight_key(name) in shapes for name in zero.buffers)
    entries = [*_weights(zero, shapes), *(() if is_without else _buffers(zero))]
    merges = any(map(is_adapter, shapes)) and not any(gathered(any(map(is_adapter, zero.parts))))
    if merges:
        shapes = {key: shape for key, shape in shapes.items() if not is_adapter(key)}
    _check_shapes(path, entries, shapes, ("model.",))
    _read(path, entries, merges)
    _finish(zero, engine)
    return list(zero.buffers) if is_without else []


def _verified_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Check all files, each rank some, and return the shapes of the tensors in them."""
    with agreed(f"verifying {path}"):
        files = sorted(read_manifest(path)["files"])
        verify_files(path, files[dist.get_rank() :: dist.get_world_size()])
        shapes = read_shapes(path)
    return shapes


@dataclass(frozen=True)
class _Entry:
    """Something to read: the parts of it that this rank needs, and what to do with them."""

    wanted: dict[str, ShardedTensor]
    put: Callable[[dict[str, Tensor]], None]

    @property
    def nbytes(self) -> int:
        """Bytes in memory once read."""
        return sum(prod(part.local_shape) * part.dtype.itemsize for part in self.wanted.values())


def _weights(zero: ZeroState, shapes: dict[str, tuple[int, ...]] | None = None) -> Iterator[_Entry]:
    """The weights; where shapes are given, adapters that are not among them stay as they are: new on that model."""
    for name, part in zero.parts.items():
        if shapes is not None and is_adapter(name) and names.weight_key(name) not in shapes:
            continue
        yield _part_entry(names.weight_key(name), part, partial(zero.set_weight, name))


def _moments(zero: ZeroState) -> Iterator[_Entry]:
    for moment in zero.moments:
        for name, part in zero.trained.items():
            yield _part_entry(names.moment_key(name, moment), part, partial(zero.set_moment, name, moment))
    if zero.moments:
        key = names.OPTIMIZER_STEP

        def put_step(loaded: dict[str, Tensor]) -> None:
            zero.step = int(loaded[key])

        yield _Entry({key: names.replicated(key, torch.zeros(1, dtype=torch.int64))}, put_step)


def _part_entry(key: str, part: Part, put: Callable[[Tensor], None]) -> _Entry:
    return _Entry(names.pieces_of(key, part), lambda loaded: put(names.joined(key, part, loaded)))


def _buffers(zero: ZeroState) -> Iterator[_Entry]:
    for name, buffer in zero.buffers.items():
        key = names.weight_key(name)
        wanted = {key: names.replicated(key, torch.empty(buffer.shape), stage_group())}
        yield _Entry(wanted, lambda loaded, key=key, buffer=buffer: buffer.copy_(loaded[key]))  # type: ignore[misc]


def _random_states(shapes: dict[str, tuple[int, ...]]) -> Iterator[_Entry]:
    """The random states of as many ranks and of the same kind of generator as here."""
    for kind, state in platform.random_states().items():
        key = names.random_key(kind)
        if shapes.get(key) == (dist.get_world_size(), state.numel()):
            yield _Entry({key: names.part_by_rank(key, state)}, partial(_put_random_state, kind, key))


def _put_random_state(kind: str, key: str, loaded: dict[str, Tensor]) -> None:
    platform.restore_random_states({kind: loaded[key].squeeze(0)})


def _read(path: Path, entries: list[_Entry], merges: bool = False) -> None:
    """Read and put all entries, of each rank ``_BATCH_BYTES`` at a time: its part may be larger than its memory."""
    batches: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if size and size + entry.nbytes > _BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(entry)
        size += entry.nbytes
    with agreed(f"reading the index of {path}"):
        reader = MergedReader(path) if merges else CheckpointReader(path)
    for number in range(max(gathered(len(batches)))):  # reading is collective, and stages have different parts
        _read_batch(path, reader, batches[number] if number < len(batches) else [])


def _read_batch(path: Path, reader: CheckpointReader | MergedReader, batch: list[_Entry]) -> None:
    wanted = {name: part for entry in batch for name, part in entry.wanted.items()}
    with agreed(f"reading tensors from {path}"):
        if isinstance(reader, MergedReader):
            loaded = {
                name: reader.read(part.key, part.global_offset, part.local_shape) for name, part in wanted.items()
            }
        else:
            loaded = names.read_tensors(reader, wanted)
    for entry in batch:
        entry.put(loaded)
        for part in entry.wanted.values():
            part.data = None  # reading put it there, and the entry outlives the batch


def _finish(zero: ZeroState, engine: TrainingEngine) -> None:
    zero.update_weights()
    engine.share_tied_embedding()


def _check_shapes(
    path: Path, entries: list[_Entry], present: dict[str, tuple[int, ...]], prefixes: tuple[str, ...]
) -> None:
    """Refuse, on every rank, a tensor that is missing, unexpected or of another shape; each stage wants its own."""
    wanted = [part for entry in entries for part in entry.wanted.values()]
    known = set().union(*gathered({part.key for part in wanted}))
    with agreed(f"comparing with {path}"):
        for part in wanted:
            key = part.key
            if key not in present:
                raise UserError(f"checkpoint {path}: tensor {key} is missing; {OFTEN}")
            if tuple(part.global_shape) != present[key]:
                raise UserError(
                    f"checkpoint {path}: tensor {key} has shape {present[key]}, "
                    f"needed is {tuple(part.global_shape)}; {OFTEN}"
                )
        for key in present:
            if key.startswith(prefixes) and key not in known:
                raise UserError(f"checkpoint {path}: tensor {key} has no place here; {OFTEN}")
