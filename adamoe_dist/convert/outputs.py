"""Directories that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from adamoe_dist.checkpoint import UNFINISHED, sync_directory
from adamoe_dist.errors import UserError

MARKER = ".unfinished"
"""A file in a directory that is being written, locked by its writer: what a dead one left is known by it."""
_MARGIN_BYTES = 16 << 20


def check_output(target: Path, needed: int, key: str = "--to") -> None:
    """Refuse a target that cannot be made, before anything is.

    Args:
        target: what is to be made; a link means what it points to.
        needed: bytes that are to be written.
        key: the option that named it.

    Raises:
        UserError: it has something in it or is a mount point, its disk has too little room, another run writes it, or
            what is in the place where it would be written is not a leftover of such a run.
    """
    try:
        final = _resolved(target)
        if _is_there(final) and not (final.is_dir() and not any(final.iterdir())):
            raise UserError(f"{key} {target} is there already and not an empty directory; give a new one or remove it")
        if os.path.ismount(final):
            raise UserError(
                f"{key} {target} is a mount point, whose name a finished directory cannot take; give a new directory "
                "in it"
            )
        place = final.parent
        while not place.exists():
            place = place.parent
        unfinished, freed = _unfinished(final), 0
        if _is_there(unfinished):
            with _held(unfinished, "r+", key):
                freed = _size(unfinished)
        free = shutil.disk_usage(place).free + freed
    except OSError as problem:
        raise UserError(f"{key} {target} cannot be made ({problem.strerror}); give another place") from problem
    if free < needed + _MARGIN_BYTES:
        raise UserError(
            f"{key} {target}: {needed / 1e9:.2f} GB are to be written and the disk of {place} has "
            f"{free / 1e9:.2f} GB left; free some or give another place"
        )


@contextlib.contextmanager
def new_directory(target: Path, needed: int, key: str = "--to") -> Iterator[Path]:
    """Give a directory beside ``target`` that becomes ``target`` when the block ends well.

    What a run that was killed has left there is removed first; what one that fails has written, at once.

    Raises:
        UserError: see :func:`check_output`; or a directory or file cannot be written.
    """
    check_output(target, needed, key)
    final = _resolved(target)
    unfinished = _unfinished(final)
    try:
        if _is_there(unfinished):
            with _held(unfinished, "r+", key):
                shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        marker = _held(unfinished, "x", key)
    except OSError as problem:
        raise UserError(f"{key} {unfinished} cannot be made ({problem.strerror}); give another place") from problem
    with marker:
        try:
            yield unfinished
            (unfinished / MARKER).unlink()
            sync_directory(unfinished)
            os.replace(unfinished, final)
            sync_directory(final.parent)
        except BaseException as problem:
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            if isinstance(problem, OSError):
                raise UserError(f"{key} {target} cannot be written ({problem}); nothing is left of it") from problem
            raise


def _held(unfinished: Path, mode: str, key: str) -> IO[str]:
    """Return the marker of an unfinished directory, opened in ``mode`` and locked: nobody else writes there.

    Raises:
        UserError: somebody does, or there is no marker.
    """
    try:
        marker = (unfinished / MARKER).open(mode)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{key}: {unfinished} is there, where the new directory is written until it is whole, and is no leftover "
            "of that; move it away or give another place"
        ) from None
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_taken = os.fstat(marker.fileno()).st_nlink == 0  # removed by whoever had the lock before
    except BlockingIOError:
        is_taken = True
    if is_taken:
        marker.close()
        raise UserError(f"{key}: another run is writing {unfinished}; wait until it is done or give another place")
    return marker


def _is_there(path: Path) -> bool:
    """Tell whether something has this name; another than a missing one raises what is wrong with it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _resolved(target: Path) -> Path:
    return Path(os.path.realpath(target))


def _unfinished(final: Path) -> Path:
    return final.with_name(final.name + UNFINISHED)


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
