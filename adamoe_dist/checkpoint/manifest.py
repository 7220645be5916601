"""The plain files of a checkpoint: its manifest of sizes and hashes, the run's configuration, the run's state."""

import hashlib
import json
import os
import platform as python_platform
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from adamoe_dist import __version__
from adamoe_dist.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.json"
STATE = "state.json"
OTHER_CHECKPOINT = "choose another checkpoint"

FileEntry = dict[str, Any]
OnBytes = Callable[[int], object]
"""Told how many bytes were read since it was last told: for a progress bar."""
_CHUNK_BYTES = 1 << 22


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write plain values to ``path`` and to the disk under it."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def describe_file(path: Path, on_bytes: OnBytes | None = None) -> FileEntry:
    """Return ``{"bytes", "sha256"}`` of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def copy_file(source: Path, target: Path, on_bytes: OnBytes | None = None) -> FileEntry:
    """Copy a file to a new one, and to the disk under it; return :func:`describe_file` of what was copied."""
    digest, copied = hashlib.sha256(), 0
    with source.open("rb") as file, target.open("xb") as copy:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            copied += copy.write(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
        copy.flush()
        os.fsync(copy.fileno())
    return {"bytes": copied, "sha256": digest.hexdigest()}


def build_manifest(step: int, layout: dict[str, Any], files: dict[str, FileEntry]) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Args:
        step: the step after which it was taken.
        layout: how the run was cut (world size, degrees, ZeRO stage, precision): for the reader, nothing depends on it.
        files: :func:`describe_file` of every file by name.
    """
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "layout": layout,
        "versions": {
            "adamoe_dist": __version__,
            "python": python_platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")},
        },
        "files": dict(sorted(files.items())),
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint directory ``path``.

    Raises:
        UserError: there is none, it cannot be read, lists no files or one that is elsewhere, or is of another format
            version.
    """
    manifest = _read_json(path / MANIFEST)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path / MANIFEST}: format_version {version} cannot be read (this program reads {FORMAT_VERSION}); "
            "use the version of adamoe_dist that wrote it"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise UserError(f"{path / MANIFEST} has no list of files with sizes and hashes; {OTHER_CHECKPOINT}")
    if type(manifest.get("step")) is not int or not isinstance(manifest.get("layout"), dict):
        raise UserError(f"{path / MANIFEST} does not say of which step and layout it is; {OTHER_CHECKPOINT}")
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{path / MANIFEST} lists {name!r}, which is outside the checkpoint; {OTHER_CHECKPOINT}")
    return manifest


def read_config(path: Path) -> dict[str, Any]:
    """Return the resolved configuration of the run that wrote the checkpoint ``path``.

    Raises:
        UserError: it is missing or cannot be read.
    """
    return _read_json(path / CONFIG)


def read_state(path: Path) -> dict[str, Any]:
    """Return the state that was given to ``save_checkpoint`` for the checkpoint ``path``.

    Raises:
        UserError: it is missing or cannot be read.
    """
    return _read_json(path / STATE)


def find_incompleteness(path: Path) -> str | None:
    """Say what a directory lacks to be a complete checkpoint, or return None; sizes are compared, not contents."""
    try:
        files = read_manifest(path)["files"]
    except UserError as problem:
        return str(problem)
    for name, entry in files.items():
        file = path / name
        if file.is_symlink():
            return f"{file} is a link to another file"
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}"
    return None


def bytes_of_files(path: Path) -> int:
    """Return the size of all files that the manifest of a checkpoint directory lists: what verifying it reads."""
    return sum(entry["bytes"] for entry in read_manifest(path)["files"].values())


def verify_files(path: Path, names: Iterable[str] | None = None, on_bytes: OnBytes | None = None) -> None:
    """Check the size and the hash of a checkpoint's files against its manifest.

    Args:
        path: the checkpoint directory.
        names: the files to check; None means all.
        on_bytes: told of every part that was read.

    Raises:
        UserError: naming the first file that is missing or differs.
    """
    files = read_manifest(path)["files"]
    problem = find_incompleteness(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} is incomplete: {problem}; {OTHER_CHECKPOINT}")
    for name in files if names is None else names:
        if name not in files:
            raise UserError(f"{path / MANIFEST} does not list {name}; {OTHER_CHECKPOINT}")
        require_unchanged(path / name, describe_file(path / name, on_bytes), files[name])


def require_unchanged(file: Path, found: FileEntry, saved: FileEntry) -> None:
    """Refuse a file that is not what the manifest says.

    Raises:
        UserError: naming the file.
    """
    if found["sha256"] != saved["sha256"]:
        raise UserError(
            f"{file} was changed or damaged after it was saved (sha256 differs from {MANIFEST}); {OTHER_CHECKPOINT}"
        )


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} and isinstance(entry["bytes"], int)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {OTHER_CHECKPOINT}") from None
    except (OSError, RecursionError, ValueError) as problem:
        raise UserError(f"{path} cannot be read ({problem}); {OTHER_CHECKPOINT}") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; {OTHER_CHECKPOINT}")
    return content
