"""The records of a checkpoint's index, read from a pickle without trust.

Each is read into a plain stand-in that only keeps what it is given; what is made of them is checked.
"""

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8}
NOT_AN_INDEX = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading something else as an index may raise."""


@dataclass(frozen=True)
class Block:
    """One block of a tensor, and where it is: ``length`` bytes from ``start`` of ``file``, as ``torch.save`` writes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class TensorEntry:
    """One whole tensor: its shape and the blocks that it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]


def entries_of(content: bytes) -> dict[str, TensorEntry]:
    """Return the tensors of a pickled index by name.

    Whatever of :data:`NOT_AN_INDEX` is raised means that it is no index, or one that does not hold together.
    """
    return _entries(_IndexReader(io.BytesIO(content)).load())


class _Record:
    """What a pickled record was given, whatever its class would have done with it."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexReader(pickle.Unpickler):
    """Reads the pickled records of an index as :class:`_Record`; nothing else can be in it."""

    ALLOWED = {  # noqa: RUF012
        "torch": {"Size", *DTYPES},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return DTYPES[name] if module == "torch" and name in DTYPES else type(name, (_Record,), {"kind": name})


def _entries(metadata: Any) -> dict[str, TensorEntry]:
    records = _state(metadata, "Metadata")
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for place, info in records["storage_data"].items():
        index, stored = _state(place, "MetadataIndex"), _state(info, "_StorageInfo")
        key = index["fqn"]
        if stored.get("transform_descriptors"):
            raise ValueError(f"{key} is stored in a form of its own")
        start, length = _ints((stored["offset"], stored["length"]))
        where = _plain_name(stored["relative_path"]), start, length
        if "offset" not in index:
            raise ValueError(f"{key} is not a tensor")
        if (key, _size(index["offset"])) in places:
            raise ValueError(f"{key} has two places for one part")
        places[key, _size(index["offset"])] = where
    entries = {key: _entry(key, record, places) for key, record in records["state_dict_metadata"].items()}
    if places:
        raise ValueError(f"{next(iter(places))[0]} has a place and no shape")
    return entries


def _entry(key: Any, record: Any, places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]) -> TensorEntry:
    """Check one tensor and take its blocks out of ``places``."""
    if not isinstance(key, str) or getattr(record, "kind", "") != "TensorStorageMetadata":
        raise ValueError(f"{key!r} is not a tensor")
    state = _state(record, "TensorStorageMetadata")
    shape, dtype = _size(state["size"]), _state(state["properties"], "TensorProperties", tuple)[0]
    if dtype not in DTYPES.values():
        raise ValueError(f"{key} has no type")
    blocks = []
    for chunk in state["chunks"]:
        chunk_state = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk_state["offsets"]), _size(chunk_state["sizes"])
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if any(end > whole for end, whole in zip(ends, shape, strict=True)) or (key, offsets) not in places:
            raise ValueError(f"{key} has a part that is outside it or nowhere")
        blocks.append(Block(offsets, sizes, *places.pop((key, offsets))))
    if sum(math.prod(block.sizes) for block in blocks) != math.prod(shape):
        raise ValueError(f"{key} is not there as a whole")
    return TensorEntry(shape, dtype, tuple(blocks))


def _state(record: Any, kind: str, of: type = dict) -> Any:
    if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.state, of):
        raise ValueError(f"something else is in the place of {kind}")
    return record.state


def _size(record: Any) -> tuple[int, ...]:
    if not isinstance(record, _Record) or record.kind != "Size":
        raise ValueError("something else is in the place of a size")
    (numbers,) = record.arguments
    return _ints(numbers)


def _ints(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("something else is in the place of a number")
    return numbers


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"it points to {name!r}, which is not the name of a file in the checkpoint")
    return name
