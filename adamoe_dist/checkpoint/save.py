"""Saving: all ranks write, one publishes."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from adamoe_dist import platform
from adamoe_dist.checkpoint import tensors as names
from adamoe_dist.checkpoint.agreement import CheckpointError, agreed, gathered
from adamoe_dist.checkpoint.directory import (
    UNFINISHED,
    directory_name,
    publish,
    remove_leftovers,
    remove_older,
)
from adamoe_dist.checkpoint.manifest import CONFIG, MANIFEST, STATE, build_manifest, describe_file, write_json
from adamoe_dist.checkpoint.zero import ZeroState
from adamoe_dist.model import Part, canonical_buffers
from adamoe_dist.parallel import TrainingEngine, stage_group


def save_checkpoint(
    root: Path,
    step: int,
    engine: TrainingEngine,
    state: dict[str, Any],
    config: dict[str, Any],
    layout: dict[str, Any],
    keep_last: int | None,
) -> Path:
    """Save a checkpoint; all ranks call it together, between two steps.

    It appears under its name when every rank has written its part, or not at all.

    Args:
        root: the directory of checkpoints, which all ranks see; made where it is missing.
        step: the number of steps done.
        engine: weights, moments and step count are taken from it.
        state: what else the run needs to continue, plain JSON values; rank 0's is saved.
        config: the resolved tree.
        layout: how the run is cut, for the manifest.
        keep_last: how many checkpoints to keep, this one among them; None keeps all.

    Returns:
        The checkpoint directory.

    Raises:
        CheckpointError: another rank failed (the failing rank raises what it met), or a buffer that must be the same on
            all ranks is not. No checkpoint appears.
    """
    unfinished, is_first = root / (directory_name(step) + UNFINISHED), dist.get_rank() == 0
    with agreed(f"making {unfinished}"):
        if is_first:
            root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(root)
            unfinished.mkdir()
    _require_equal_buffers(engine)
    collected = collect_tensors(engine)
    with agreed(f"writing tensors to {unfinished}"):
        names.write_tensors(unfinished, collected)
    with agreed(f"writing {unfinished / STATE}"):
        if is_first:
            write_json(unfinished / CONFIG, config)
            write_json(unfinished / STATE, state)
    files = _describe_files(unfinished)
    with agreed(f"publishing {unfinished}"):
        if is_first:
            write_json(unfinished / MANIFEST, build_manifest(step, layout, files))
            publish(unfinished, root, step)
            if keep_last is not None:
                remove_older(root, step, keep_last)
    return root / directory_name(step)


def collect_tensors(engine: TrainingEngine) -> dict[str, ShardedTensor]:
    """Return the tensors of a checkpoint; data are in CPU memory, on the rank that writes each."""
    zero = ZeroState(engine)
    collected: dict[str, ShardedTensor] = {}

    def add(key: str, part: Part, turn: int, value: torch.Tensor) -> None:
        is_writer = (part.replica - turn) % part.replicas == 0
        collected.update(names.pieces_of(key, part, turn, value.detach().cpu() if is_writer else None))

    for turn, (name, part) in enumerate(zero.parts.items()):
        add(names.weight_key(name), part, turn, zero.weight(name))
        for moment in zero.moments:
            add(names.moment_key(name, moment), part, turn, zero.moment(name, moment))
    for name, buffer in zero.buffers.items():
        key = names.weight_key(name)
        collected[key] = names.replicated(key, buffer.detach().cpu(), stage_group())
    if zero.moments:
        collected[names.OPTIMIZER_STEP] = names.replicated(names.OPTIMIZER_STEP, torch.tensor([zero.step]))
    for device, random_state in platform.random_states().items():
        key = names.random_key(device)
        collected[key] = names.part_by_rank(key, random_state)
    return collected


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


def _describe_files(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file; each rank reads some of them."""
    with agreed(f"listing {path}"):
        listing = sorted(entry.name for entry in path.iterdir())
    listing = gathered(listing)[0]
    with agreed(f"reading {path} again"):
        described = {name: describe_file(path / name) for name in listing[dist.get_rank() :: dist.get_world_size()]}
    return {name: entry for part in gathered(described) for name, entry in part.items()}
