"""Checks on output files that every tool makes before its work."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from adamoe_dist.errors import UserError


def refuse_existing(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace files unless that was asked for.

    Raises:
        UserError: one of ``files`` exists and ``overwrite`` is false.
    """
    present = next((file for file in files if file.exists()), None)
    if present is not None and not overwrite:
        raise UserError(f"--output: {present} exists already; choose another name or add --overwrite")


def require_writable(directory: Path) -> None:
    """Make ``directory`` where it is missing and check that a file can be written in it.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"--output: {directory} cannot be written ({error.strerror}); choose another directory"
        ) from error
