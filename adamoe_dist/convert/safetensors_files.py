"""Safetensors files tensor by tensor: no file is mapped into memory or held there.

The format is 8 bytes with the length of a JSON header, the header, and the numbers that it places.
"""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamoe_dist.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
NAMES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ALIGNMENT = 8
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its type in safetensors' words, its shape, and where its bytes begin in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Size; of the types that can be converted."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name.

    Raises:
        UserError: it is not one, is a pointer of git-lfs, or its header places tensors beyond its end or over each
            other.
    """
    _refuse_pointer(path)
    try:
        with safe_open(str(path), framework="pt"):  # checks lengths, overlaps and holes
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not a whole safetensors file ({problem}); fetch it again") from problem
    header.pop("__metadata__", None)
    return {
        name: Stored(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _refuse_pointer(path: Path) -> None:
    """Refuse a file that git-lfs has not fetched yet."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of git-lfs, not the file itself; run git lfs pull in {path.parent}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: there is none, it is a pointer of git-lfs, or a key stands there twice.
    """
    _refuse_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a directory that save_pretrained wrote") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{path} cannot be read as JSON ({problem}); fetch it again") from problem
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; fetch it again")
    return content


class TensorFiles:
    """Reads rows of tensors in the safetensors files of a directory."""

    def __init__(self, directory: Path) -> None:
        """Read from the files of ``directory``."""
        self._directory = directory
        self._open: dict[str, IO[bytes]] = {}

    def read(self, tensor: Stored, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` (None: the last) of a tensor, in its type.

        Raises:
            UserError: the file is shorter than it was.
        """
        if tensor.file not in self._open:
            self._open[tensor.file] = (self._directory / tensor.file).open("rb")
        file, dtype = self._open[tensor.file], DTYPES[tensor.dtype]
        shape = tensor.shape or (1,)
        rows, row = (shape[0] if stop is None else stop) - start, prod(shape[1:]) * dtype.itemsize
        raw = bytearray(rows * row)
        file.seek(tensor.start + start * row)
        if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
            raise UserError(f"{self._directory / tensor.file} has become shorter while it was read; run again")
        return torch.frombuffer(raw, dtype=dtype).view(rows, *shape[1:])

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorFileWriter:
    """Writes one safetensors file: its header first, then each tensor as it comes, in the header's order."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Write the header of tensors whose types and shapes are known."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in tensors.items():
            size = prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            position += size
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % _ALIGNMENT)
        self._left = list(tensors.items())
        self._file = path.open("xb")
        self._file.write(len(content).to_bytes(8, "little") + content)

    def add(self, name: str, value: Tensor) -> None:
        """Write the next tensor."""
        expected, (dtype, shape) = self._left.pop(0)
        assert (name, tuple(value.shape)) == (expected, shape), (name, value.shape, expected, shape)
        flat = value.to(dtype).contiguous().view(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Bring the file to the disk."""
        assert not self._left, f"{self._left[0][0]} was not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()
