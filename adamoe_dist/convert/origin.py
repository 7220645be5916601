"""What an import keeps of where a model came from, so that an export can give it back.

``CKPT_DIR/huggingface/`` has the files beside the weights as they were; ``huggingface.json`` in the checkpoint, under
its manifest, has their hashes, and the type and the file of each tensor.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adamoe_dist.checkpoint import (
    CheckpointError,
    checkpoint_at,
    describe_file,
    read_config,
    read_manifest,
    verify_files,
)
from adamoe_dist.config import Config
from adamoe_dist.convert.families import FAMILIES
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.safetensors_files import DTYPES, Stored, read_json
from adamoe_dist.errors import UserError

FILES = "huggingface"
RECORD = "huggingface.json"


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint's model came from.

    Attributes:
        family: of the Hugging Face model.
        vocab_size: rows of its embedding.
        files: the directory with its files; they have the hashes that the checkpoint names.
        names: of the files; what else lies in the directory is not the import's.
        tensors: type and file of each tensor, file by file, as they lay there.
    """

    family: Family
    vocab_size: int
    files: Path
    names: tuple[str, ...]
    tensors: dict[str, tuple[torch.dtype, str]]


class FilesMissingError(UserError):
    """A checkpoint of an imported model stands alone: nothing that the import kept is there."""


def imported_family(checkpoint: Path) -> str | None:
    """Return the ``model_type`` that a checkpoint was imported from, None where it is not an imported one."""
    if RECORD not in read_manifest(checkpoint)["files"]:
        return None
    return str(read_json(checkpoint / RECORD)["family"])


def record_of(family: Family, vocab_size: int, tensors: dict[str, Stored], files: dict[str, Any]) -> dict[str, Any]:
    """Return the content of :data:`RECORD`.

    Args:
        family: of the model.
        vocab_size: rows of the embedding.
        tensors: by name.
        files: size and hash of each kept file.
    """
    ordered = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start))
    return {
        "family": family.model_type,
        "vocab_size": vocab_size,
        "files": files,
        "tensors": {name: [stored.dtype, stored.file] for name, stored in ordered},
    }


def origin_of(checkpoint: Path) -> Origin | None:
    """Return where the model of a checkpoint directory came from, or None where it is not an imported one.

    Raises:
        FilesMissingError: the directory of the kept files is not there.
        UserError: one of the kept files is missing or was changed.
    """
    if RECORD not in read_manifest(checkpoint)["files"]:
        return None
    verify_files(checkpoint, [RECORD])
    record = read_json(checkpoint / RECORD)
    directory = _directory(checkpoint)
    if not directory.is_dir():
        raise FilesMissingError(f"{directory} is missing, where the import of {checkpoint} kept what is not weights")
    for name, entry in record["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{checkpoint / RECORD} names {name!r}, which is outside {directory}; import the model again"
            )
        _require_kept(directory / name, entry)
    tensors = {name: (DTYPES[code], file) for name, (code, file) in record["tensors"].items()}
    return Origin(
        FAMILIES[record["family"]], int(record["vocab_size"]), directory, tuple(sorted(record["files"])), tensors
    )


def _directory(checkpoint: Path) -> Path:
    """Return where the kept files are: beside the checkpoint, or for a changed copy of it beside the first one."""
    beside, named = checkpoint.parent / FILES, Path(read_config(checkpoint)["data"]["tokenizer"])
    return named if not beside.is_dir() and named.name == FILES and named.is_dir() else beside


def _require_kept(file: Path, entry: dict[str, Any]) -> None:
    if not file.is_file() or describe_file(file) != entry:
        raise UserError(f"{file} is missing or was changed after the import; import the model again")


def origin_of_run(config: Config) -> Origin | None:
    """Return where the weights came from that a run started with, or its tokenizer; None: from no import.

    A run that was continued no longer names its first weights, but still the tokenizer that was imported with them.

    Raises:
        UserError: what the import kept was changed since.
    """
    places = [config.checkpoint.load_weights, config.data.tokenizer and str(Path(config.data.tokenizer).parent)]
    for place in places:
        checkpoint = _checkpoint_in(place) if place else None
        if checkpoint is None:
            continue
        try:
            found = origin_of(checkpoint)
        except (UserError, CheckpointError) as problem:
            raise UserError(
                f"the run started from {place}, and {problem}; or move that directory away to export without its files"
            ) from problem
        if found is not None:
            return found
    return None


def _checkpoint_in(place: str) -> Path | None:
    """Return the checkpoint at a place, None where there is none any more or never was."""
    if not Path(place).is_dir():
        return None
    try:
        return checkpoint_at(place, "checkpoint.load_weights")
    except UserError:
        return None
