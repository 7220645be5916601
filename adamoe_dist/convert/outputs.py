"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from adamoe_dist.checkpoint import UNFINISHED, sync_directory
from adamoe_dist.errors import UserError

_MARGIN_BYTES = 16 << 20


def check_output(target: Path, needed: int, key: str = "--to") -> None:
    """Refuse a target that has something in it, or whose disk has too little room.

    Args:
        target: what is to be made.
        needed: bytes that are to be written.
        key: the option that named it.

    Raises:
        UserError: saying which of the two.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{key} {target} is there already and not an empty directory; give a new one or remove it")
    place = target.absolute()
    while not place.exists():
        place = place.parent
    leftover = _leftover(target)
    free = shutil.disk_usage(place).free + (_size(leftover) if leftover.is_dir() else 0)
    if free < needed + _MARGIN_BYTES:
        raise UserError(
            f"{key} {target}: {needed / 1e9:.2f} GB are to be written and the disk of {place} has "
            f"{free / 1e9:.2f} GB left; free some or give another place"
        )


@contextlib.contextmanager
def new_directory(target: Path, needed: int, key: str = "--to") -> Iterator[Path]:
    """Give an empty directory beside ``target`` that becomes ``target`` when the block ends well.

    What a run that was killed has left there is removed first; what one that fails has written, at once.

    Raises:
        UserError: see :func:`check_output`; or a directory or file cannot be written.
    """
    check_output(target, needed, key)
    unfinished = _leftover(target)
    try:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    except OSError as problem:
        raise UserError(f"{key} {unfinished} cannot be made ({problem.strerror}); give another place") from problem
    try:
        yield unfinished
        sync_directory(unfinished)
        os.replace(unfinished, target)
        sync_directory(target.absolute().parent)
    except OSError as problem:
        raise UserError(f"{key} {target} cannot be written ({problem}); nothing is left of it") from problem
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)


def _leftover(target: Path) -> Path:
    absolute = target.absolute()
    return absolute.with_name(absolute.name + UNFINISHED)


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
