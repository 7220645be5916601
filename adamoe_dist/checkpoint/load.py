"""Loading into any layout: every rank reads its part of the whole tensors."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from adamoe_dist import platform
from adamoe_dist.checkpoint import tensors as names
from adamoe_dist.checkpoint.agreement import agreed, gathered
from adamoe_dist.checkpoint.index import read_shapes
from adamoe_dist.checkpoint.manifest import read_manifest, read_state, verify_files
from adamoe_dist.checkpoint.zero import ZeroState
from adamoe_dist.errors import UserError
from adamoe_dist.parallel import TrainingEngine, stage_group

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
    wanted = _wanted_weights(zero) | _wanted_buffers(zero) | _wanted_moments(zero)
    known = _known_everywhere(wanted)
    with agreed(f"reading {path}"):
        _check_shapes(path, wanted, known, shapes, ("model.", "optimizer."))
        state = read_state(path)
    random_states = _readable_random_states(shapes)
    with agreed(f"reading tensors from {path}"):
        loaded = names.read_tensors(path, wanted | random_states)
    _set_weights(zero, engine, loaded)
    _set_buffers(zero, loaded)
    for name, part in zero.parts.items():
        for moment in zero.moments:
            zero.set_moment(name, moment, names.joined(names.moment_key(name, moment), part, loaded))
    if zero.moments:
        zero.step = int(loaded[names.OPTIMIZER_STEP])
    prefix = names.random_key("")
    platform.restore_random_states({key.removeprefix(prefix): loaded[key].squeeze(0) for key in random_states})
    return state


def load_weights(path: Path, engine: TrainingEngine) -> list[str]:
    """Take a checkpoint's weights and buffers, and nothing else; all ranks call it together.

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
    buffers = _wanted_buffers(zero)
    is_without = not any(key in shapes for key in buffers)
    wanted = _wanted_weights(zero) | ({} if is_without else buffers)
    known = _known_everywhere(wanted)
    with agreed(f"reading {path}"):
        _check_shapes(path, wanted, known, shapes, ("model.",))
    with agreed(f"reading tensors from {path}"):
        loaded = names.read_tensors(path, wanted)
    _set_weights(zero, engine, loaded)
    if is_without:
        return list(zero.buffers)
    _set_buffers(zero, loaded)
    return []


def _verified_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Check all files, each rank some, and return the shapes of the tensors in them."""
    with agreed(f"verifying {path}"):
        files = sorted(read_manifest(path)["files"])
        verify_files(path, files[dist.get_rank() :: dist.get_world_size()])
        shapes = read_shapes(path)
    return shapes


def _wanted_weights(zero: ZeroState) -> dict[str, ShardedTensor]:
    wanted: dict[str, ShardedTensor] = {}
    for name, part in zero.parts.items():
        wanted |= names.pieces_of(names.weight_key(name), part)
    return wanted


def _wanted_buffers(zero: ZeroState) -> dict[str, ShardedTensor]:
    keys = {names.weight_key(name): buffer for name, buffer in zero.buffers.items()}
    return {key: names.replicated(key, torch.empty(buffer.shape), stage_group()) for key, buffer in keys.items()}


def _wanted_moments(zero: ZeroState) -> dict[str, ShardedTensor]:
    wanted: dict[str, ShardedTensor] = {}
    for moment in zero.moments:
        for name, part in zero.parts.items():
            wanted |= names.pieces_of(names.moment_key(name, moment), part)
    if zero.moments:
        wanted[names.OPTIMIZER_STEP] = names.replicated(names.OPTIMIZER_STEP, torch.zeros(1, dtype=torch.int64))
    return wanted


def _readable_random_states(shapes: dict[str, tuple[int, ...]]) -> dict[str, ShardedTensor]:
    """The random states of as many ranks and of the same kind of device as here."""
    states = {names.random_key(device): state for device, state in platform.random_states().items()}
    return {
        key: names.part_by_rank(key, state)
        for key, state in states.items()
        if shapes.get(key) == (dist.get_world_size(), state.numel())
    }


def _known_everywhere(wanted: dict[str, ShardedTensor]) -> set[str]:
    """The names of the tensors that some rank wants: each pipeline stage wants its own. Collective."""
    return set().union(*gathered({part.key for part in wanted.values()}))


def _check_shapes(
    path: Path,
    wanted: dict[str, ShardedTensor],
    known: set[str],
    present: dict[str, tuple[int, ...]],
    prefixes: tuple[str, ...],
) -> None:
    for part in wanted.values():
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


def _set_weights(zero: ZeroState, engine: TrainingEngine, loaded: dict[str, Any]) -> None:
    for name, part in zero.parts.items():
        zero.set_weight(name, names.joined(names.weight_key(name), part, loaded))
    zero.update_weights()
    engine.share_tied_embedding()


def _set_buffers(zero: ZeroState, loaded: dict[str, Any]) -> None:
    for name, buffer in zero.buffers.items():
        buffer.copy_(loaded[names.weight_key(name)])
