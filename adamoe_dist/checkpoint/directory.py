"""Which checkpoints a directory holds, which one to continue from, and which to remove."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from adamoe_dist.checkpoint.manifest import find_incompleteness
from adamoe_dist.config import Config
from adamoe_dist.errors import UserError

POINTER = "latest_checkpointed_iteration.txt"
SUBDIRECTORY = "checkpoints"
UNFINISHED = ".tmp"
_NAME = re.compile(r"iter_(\d{7,})")


def directory_name(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"iter_{step:07d}"


def list_checkpoints(root: Path) -> dict[int, Path]:
    """Return the checkpoint directories under ``root`` by step, in ascending order, complete or not."""
    if not root.is_dir():
        return {}
    found = {int(match[1]): entry for entry in root.iterdir() if (match := _NAME.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def has_checkpoints(root: Path) -> bool:
    """Tell whether ``root`` holds a checkpoint, complete or not."""
    return bool(list_checkpoints(root))


def newest_complete(root: Path) -> Path | None:
    """Return the checkpoint that the pointer file names, or the newest complete one where that is not complete."""
    checkpoints = list_checkpoints(root)
    named = _read_pointer(root)
    candidates = [checkpoints[named]] if named in checkpoints else []
    candidates += reversed(checkpoints.values())
    return next((path for path in candidates if find_incompleteness(path) is None), None)


def directory_problem(path: Path) -> str | None:
    """Say why a path is no directory whose files can be read; None: it is one."""
    try:
        os.scandir(path).close()
    except (FileNotFoundError, NotADirectoryError):
        return "is not a directory"
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    return None if os.access(path, os.X_OK) else "cannot be read (its files cannot be opened)"


def _is_hugging_face(path: Path) -> bool:
    """Tell whether a directory holds a model in Hugging Face's format."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors*"))


def find_checkpoint(resume: str, root: Path, key: str = "checkpoint.resume") -> Path | None:
    """Return the checkpoint that a configuration value means.

    Args:
        resume: ``none``; ``auto`` (the last complete checkpoint under ``root``, if any); or a path: a checkpoint, a
            directory of checkpoints, or a run directory.
        root: the directory of this run's checkpoints.
        key: the configuration key, for messages.

    Returns:
        A complete checkpoint directory, or None for a new start.

    Raises:
        UserError: the path does not exist or has no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return newest_complete(root)
    path = Path(resume)
    if problem := directory_problem(path):
        raise UserError(f"{key}={resume} {problem}; give a checkpoint or a run directory")
    if _NAME.fullmatch(path.name) or path.name.endswith(UNFINISHED):
        problem = "its saving did not finish" if path.name.endswith(UNFINISHED) else find_incompleteness(path)
        if problem is not None:
            raise UserError(f"{key}={resume} is not a complete checkpoint ({problem}); choose another")
        return path
    inner = path / SUBDIRECTORY if (path / SUBDIRECTORY).is_dir() else path
    if problem := directory_problem(inner):
        raise UserError(f"{key}={resume}: {inner} {problem}; give a checkpoint or a run directory")
    found = newest_complete(inner)
    if found is None and _is_hugging_face(path):
        raise UserError(
            f"{key}={resume} is a Hugging Face directory; make a checkpoint of it with tools/convert_checkpoint.py "
            f"import --from {resume} --to DIR, and give DIR"
        )
    if found is None:
        raise UserError(f"{key}={resume} has no complete checkpoint; give a checkpoint or a run directory with one")
    return found


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, to continue its run or with its weights alone."""

    path: Path
    weights_only: bool


def find_start(config: Config) -> Start | None:
    """Return what ``checkpoint.resume`` and ``checkpoint.load_weights`` mean; None for a start without a checkpoint.

    Raises:
        UserError: see :func:`find_checkpoint`.
    """
    root, settings = config.run_dir / SUBDIRECTORY, config.checkpoint
    continued = find_checkpoint(settings.resume, root)
    if continued is not None:
        return Start(continued, weights_only=False)
    if settings.load_weights is None:
        return None
    weights = find_checkpoint(settings.load_weights, root, key="checkpoint.load_weights")
    return None if weights is None else Start(weights, weights_only=True)


def remove_leftovers(root: Path) -> None:
    """Remove what savings that did not finish left under ``root``; one rank calls it."""
    for entry in root.glob(f"*{UNFINISHED}"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def publish(unfinished: Path, root: Path, step: int) -> Path:
    """Give a finished directory its name and point to it; a reader sees the old state or the new one.

    Args:
        unfinished: the directory, its files on the disk.
        root: the directory of checkpoints.
        step: the checkpoint's step; an earlier checkpoint of the same step is replaced.

    Returns:
        The checkpoint directory.
    """
    final = root / directory_name(step)
    sync_directory(unfinished)
    replaced = _set_aside(final) if final.exists() else None
    unfinished.rename(final)
    pointer = root / (POINTER + UNFINISHED)
    with pointer.open("w") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(root)
    pointer.replace(root / POINTER)
    sync_directory(root)
    if replaced is not None:
        shutil.rmtree(replaced)
    return final


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep.

    Attributes:
        last: how many, the one just saved among them; None: all.
        every: those of steps that it divides are kept for good, and are not counted.
    """

    last: int | None = None
    every: int | None = None


def remove_older(root: Path, step: int, retention: Retention) -> None:
    """Remove the checkpoints before ``step`` that are not to be kept.

    Later ones, left by a run that was continued from an earlier step, are not touched.
    """
    if retention.last is None:
        return
    assert retention.last >= 1, f"{retention} would remove the checkpoint just saved"
    counted = [saved for saved in list_checkpoints(root) if not retention.every or saved % retention.every]
    earlier = [saved for saved in counted if saved < step]
    others = retention.last - 1 if step in counted else retention.last
    for saved in earlier[: max(0, len(earlier) - others)]:
        shutil.rmtree(_set_aside(root / directory_name(saved)))


def _set_aside(path: Path) -> Path:
    """Take a checkpoint's name from it, so that nobody takes a half removed one for whole."""
    doomed = path.with_name(f"{path.name}.removed{UNFINISHED}")
    path.rename(doomed)
    return doomed


def _read_pointer(root: Path) -> int | None:
    pointer = root / POINTER
    if not pointer.is_file():
        return None
    text = pointer.read_text(errors="replace").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def sync_directory(path: Path) -> None:
    """Put a directory's list of names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
