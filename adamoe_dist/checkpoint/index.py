"""The index of a checkpoint: which tensors it holds and where their bytes are.

The file is a pickle of torch's records. ``records.py`` reads it, and torch's own records are made from what was found
good: no file can make a reader run code, read outside the checkpoint's directory, or look for more than the files have.
"""

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from adamoe_dist.checkpoint.manifest import OTHER_CHECKPOINT, read_manifest
from adamoe_dist.checkpoint.records import NOT_AN_INDEX, TensorEntry, entries_of
from adamoe_dist.errors import UserError

METADATA = ".metadata"
LONGEST_REASON = 120
_NOT_TENSORS = tuple({*NOT_AN_INDEX, AssertionError, RuntimeError, OSError} - {MemoryError})

Index = Mapping[str, TensorEntry]


def read_index(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of the checkpoint directory ``path`` by name.

    Raises:
        UserError: the index cannot be read, would run code, holds anything but tensors, does not place every part of
            each, or points to a file that is not one of the checkpoint's.
    """
    file = path / METADATA
    try:
        index = entries_of(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {OTHER_CHECKPOINT}") from None
    except NOT_AN_INDEX as problem:
        raise UserError(
            f"{file} is not the index of a checkpoint ({_one_line(problem)}); {OTHER_CHECKPOINT}"
        ) from problem
    sizes = {name: entry["bytes"] for name, entry in read_manifest(path)["files"].items()}
    if METADATA not in sizes:
        raise UserError(f"{path} has a list of files without {METADATA}; {OTHER_CHECKPOINT}")
    for key, block in ((key, block) for key, entry in index.items() for block in entry.blocks):
        if block.file not in sizes:
            raise UserError(
                f"{file} says that tensor {key} is in {block.file!r}, which is not among the checkpoint's files; "
                f"{OTHER_CHECKPOINT}"
            )
        if block.start + block.length > sizes[block.file]:
            raise UserError(f"{file} says that tensor {key} is beyond the end of {block.file}; {OTHER_CHECKPOINT}")
    return index


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the whole shapes of a checkpoint's tensors by name.

    Raises:
        UserError: see :func:`read_index`.
    """
    return {key: entry.shape for key, entry in read_index(path).items()}


def write_index(path: Path, index: Index) -> None:
    """Write the index of the checkpoint directory ``path``, and to the disk under it."""
    with (path / METADATA).open("wb") as file:
        pickle.dump(_torch_metadata(index), file)
        file.flush()
        os.fsync(file.fileno())


def read_tensor(path: Path, index: Index, key: str) -> Tensor:
    """Return one whole tensor in CPU memory; no process group is needed.

    Raises:
        UserError: a file does not hold what the index says.
    """
    entry = index[key]
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    for block in entry.blocks:
        with (path / block.file).open("rb") as file:
            file.seek(block.start)
            content = io.BytesIO(file.read(block.length))
        try:
            value = torch.load(content, map_location="cpu", weights_only=True)
            place = tuple(slice(start, start + size) for start, size in zip(block.offsets, block.sizes, strict=True))
            assert value.dtype == entry.dtype and tuple(value.shape) == block.sizes, "another shape or type"
            whole[place] = value
        except _NOT_TENSORS as problem:
            raise _wrong_content(path / block.file, problem) from problem
    return whole


class CheckpointReader(FileSystemReader):
    """Torch's reader of tensors, given an index that was read by :func:`read_index`."""

    def __init__(self, path: Path) -> None:
        """Read the index of the checkpoint directory ``path``."""
        super().__init__(path)
        self.directory = path
        self._metadata = _torch_metadata(read_index(path))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked index; torch's own method would unpickle the file."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Read tensors, file by file, so that one that does not hold them is named."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            try:
                super().read_data(replace(plan, items=items), planner)
            except _NOT_TENSORS as problem:
                raise _wrong_content(self.directory / name, problem) from problem
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _wrong_content(file: Path, problem: Exception) -> UserError:
    return UserError(
        f"{file} does not hold the tensors that the index names ({_one_line(problem)}); {OTHER_CHECKPOINT}"
    )


def _one_line(problem: Exception) -> str:
    """Return the beginning of a message that may be long: torch explains how to read a pickle all the same."""
    words = " ".join(str(problem).split())
    return words if len(words) <= LONGEST_REASON else words[:LONGEST_REASON] + "..."


def _torch_metadata(index: Index) -> Metadata:
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, entry in index.items():
        chunks = [ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes)) for block in entry.blocks]
        tensors[key] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), chunks)
        for number, block in enumerate(entry.blocks):
            place = MetadataIndex(key, block.offsets, number)
            storage[place] = _StorageInfo(block.file, block.start, block.length)
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())
