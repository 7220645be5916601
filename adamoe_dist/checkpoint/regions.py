"""Blocks of whole tensors out of a checkpoint, without the rest of them in memory."""

import zipfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from adamoe_dist.checkpoint.index import read_index
from adamoe_dist.checkpoint.manifest import OTHER_CHECKPOINT
from adamoe_dist.checkpoint.records import Block, TensorEntry
from adamoe_dist.errors import UserError

_LOCAL_HEADER_BYTES = 30
_KNOWN_PLACES = 1 << 16


class RegionReader:
    """Reads blocks of a checkpoint's tensors from wherever they lie; no process group is needed.

    A stored block is a zip file of ``torch.save`` whose numbers are not compressed, in order of their axes, so that
    rows of it can be read where they are.
    """

    def __init__(self, path: Path) -> None:
        """Read the index of the checkpoint directory ``path``.

        Raises:
            UserError: the index is not one.
        """
        self.path = path
        self.index = read_index(path)
        self._files: dict[str, IO[bytes]] = {}
        self._data_start = lru_cache(_KNOWN_PLACES)(self._find_data)

    def close(self) -> None:
        """Close the files that were read."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> "RegionReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return the block of ``sizes`` at ``offsets`` of tensor ``key``.

        Raises:
            UserError: a file does not hold what the index says.
        """
        entry = self.index[key]
        out = torch.empty(sizes, dtype=entry.dtype)
        for block in entry.blocks:
            first = [max(a, b) for a, b in zip(offsets, block.offsets, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, block.offsets, block.sizes, strict=True)]
            if all(begin < end for begin, end in zip(first, last, strict=True)):
                target = tuple(slice(begin - a, end - a) for begin, end, a in zip(first, last, offsets, strict=True))
                source = tuple(
                    slice(begin - b, end - b) for begin, end, b in zip(first, last, block.offsets, strict=True)
                )
                self._copy(entry, block, source, out, target)
        return out

    def _copy(
        self, entry: TensorEntry, block: Block, source: tuple[slice, ...], out: Tensor, target: tuple[slice, ...]
    ) -> None:
        """Copy a part of a stored block, run by run of neighbouring numbers."""
        size, file = entry.dtype.itemsize, self._open(block.file)
        start = self._data_start(block, size)
        for position, count, index in _runs(block.sizes, source, target):
            file.seek(start + position * size)
            raw = bytearray(count * size)
            if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
                raise self._damaged(block, "it is too short")
            run = torch.frombuffer(raw, dtype=entry.dtype)
            out[index] = run.view(out[index].shape)

    def _find_data(self, block: Block, itemsize: int) -> int:
        """Return where in the file a block's numbers begin."""
        window = _Window(self._open(block.file), block.start, block.length)
        try:
            with zipfile.ZipFile(cast(IO[bytes], window)) as content:
                (data,) = (item for item in content.infolist() if item.filename.endswith("/data/0"))
                order = [item for item in content.infolist() if item.filename.endswith("/byteorder")]
                is_little = not order or content.read(order[0]) == b"little"
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as problem:
            raise self._damaged(block, str(problem)) from problem
        wanted = prod(block.sizes) * itemsize
        if not is_little or data.compress_type != zipfile.ZIP_STORED or data.file_size != wanted:
            raise self._damaged(block, "its numbers are stored in another form")
        window.seek(data.header_offset)
        header = window.read(_LOCAL_HEADER_BYTES)
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return block.start + data.header_offset + _LOCAL_HEADER_BYTES + names

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._files:
            self._files[name] = (self.path / name).open("rb")
        return self._files[name]

    def _damaged(self, block: Block, reason: str) -> UserError:
        return UserError(
            f"{self.path / block.file} does not hold the tensors that the index names ({reason}); {OTHER_CHECKPOINT}"
        )


def _runs(
    sizes: tuple[int, ...], source: tuple[slice, ...], target: tuple[slice, ...]
) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
    """Yield ``(position in the block, numbers, index into the output)`` of each run of neighbouring numbers."""
    axis = len(sizes)
    while axis > 0 and source[axis - 1] == slice(0, sizes[axis - 1]):
        axis -= 1
    outer = max(axis - 1, 0)  # axes before it are walked, it is cut, those after it are whole
    strides = [prod(sizes[number + 1 :]) for number in range(len(sizes))]
    inner = source[outer] if sizes else slice(0, 1)
    count = (inner.stop - inner.start) * (strides[outer] if sizes else 1)
    walked = [range(part.stop - part.start) for part in source[:outer]]
    for steps in product(*walked):
        position = inner.start * strides[outer] if sizes else 0
        position += sum((source[number].start + step) * strides[number] for number, step in enumerate(steps))
        place = tuple(target[number].start + step for number, step in enumerate(steps))
        yield position, count, (*place, *target[outer:])


class _Window:
    """A part of an open file as a file of its own, for reading."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        content = self._file.read(count)
        self._at += len(content)
        return content
