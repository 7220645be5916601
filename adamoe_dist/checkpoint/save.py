"""Saving: all ranks write, one publishes."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from adamoe_dist.checkpoint import tensors as names
from adamoe_dist.checkpoint.agreement import agreed, gathered
from adamoe_dist.checkpoint.directory import (
    UNFINISHED,
    Retention,
    directory_name,
    publish,
    remove_leftovers,
    remove_older,
)
from adamoe_dist.checkpoint.manifest import CONFIG, MANIFEST, STATE, build_manifest, describe_file, write_json
from adamoe_dist.checkpoint.snapshot import Snapshot, take_snapshot
from adamoe_dist.parallel import TrainingEngine

logger = logging.getLogger(__name__)


def save_checkpoint(
    root: Path,
    step: int,
    engine: TrainingEngine,
    state: dict[str, Any],
    config: dict[str, Any],
    layout: dict[str, Any],
    retention: Retention | None = None,
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
        retention: which checkpoints to keep; None keeps all.

    Returns:
        The checkpoint directory.

    Raises:
        CheckpointError: another rank failed (the failing rank raises what it met), or a buffer that must be the same on
            all ranks is not. No checkpoint appears.
    """
    snapshot = take_snapshot(step, engine, state, config, layout)
    names.check_coverage(snapshot.tensors)
    return write_snapshot(root, snapshot, retention or Retention())


def write_snapshot(
    root: Path, snapshot: Snapshot, retention: Retention, group: dist.ProcessGroup | None = None
) -> Path:
    """Make a checkpoint of a snapshot; all ranks call it together, in any thread.

    Args:
        root: the directory of checkpoints, which all ranks see; made where it is missing.
        snapshot: its tensors have passed ``check_coverage``.
        retention: which checkpoints to keep.
        group: of all ranks; no collective is on another one. None: the default group.

    Returns:
        The checkpoint directory.

    Raises:
        CheckpointError: another rank failed; the failing rank raises what it met. Nothing of the checkpoint is left.
    """
    unfinished, is_first = root / (directory_name(snapshot.step) + UNFINISHED), dist.get_rank() == 0
    with _without_leftovers(root, is_first):
        with agreed(f"making {unfinished}", group):
            if is_first:
                root.mkdir(parents=True, exist_ok=True)
                remove_leftovers(root)
                unfinished.mkdir()
        with agreed(f"writing tensors to {unfinished}", group):
            names.write_tensors(unfinished, snapshot.tensors, group)
        with agreed(f"writing {unfinished / STATE}", group):
            if is_first:
                names.write_format(unfinished)
                write_json(unfinished / CONFIG, snapshot.config)
                write_json(unfinished / STATE, snapshot.state)
        files = _describe_files(unfinished, group)
        with agreed(f"publishing {unfinished}", group):
            if is_first:
                manifest = build_manifest(snapshot.step, snapshot.layout, files)
                write_json(unfinished / MANIFEST, manifest)
                publish(unfinished, root, snapshot.step)
    with agreed(f"removing older checkpoints of {root}", group):
        if is_first:
            remove_older(root, snapshot.step, retention)
    return root / directory_name(snapshot.step)


@contextlib.contextmanager
def _without_leftovers(root: Path, is_first: bool) -> Iterator[None]:
    """Give back the space of a checkpoint that failed; by then no rank writes to it any more."""
    try:
        yield
    except Exception:
        if is_first:
            try:
                remove_leftovers(root)
            except OSError as problem:
                logger.warning("what was written of the checkpoint that failed cannot be removed: %s", problem)
        raise


def _describe_files(path: Path, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file; each rank reads some of them."""
    with agreed(f"listing {path}", group):
        listing = sorted(entry.name for entry in path.iterdir())
    listing = gathered(listing, group)[0]
    with agreed(f"reading {path} again", group):
        described = {name: describe_file(path / name) for name in listing[dist.get_rank() :: dist.get_world_size()]}
    return {name: entry for part in gathered(described, group) for name, entry in part.items()}
