"""A checkpoint of weights only, written tensor by tensor without ranks."""

import hashlib
import os
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch
from torch import Tensor

from adamoe_dist.checkpoint.compatibility import FINGERPRINT, WEIGHTS_ONLY
from adamoe_dist.checkpoint.directory import UNFINISHED, directory_name, publish
from adamoe_dist.checkpoint.index import METADATA, write_index
from adamoe_dist.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    STATE,
    FileEntry,
    OnBytes,
    build_manifest,
    describe_file,
    write_json,
)
from adamoe_dist.checkpoint.records import Block, TensorEntry
from adamoe_dist.checkpoint.tensors import COMMON, weight_key, write_block, write_format

TENSORS = "__0_0.distcp"
LAYOUT = {"world_size": 1, "tensor": 1, "pipeline": 1, "context": 1, "data": 1, "expert": 1, "expert_tensor": 1}


class WeightsWriter:
    """Writes ``root/iter_0000000`` block by block; it has its name once :meth:`finish` has returned.

    Blocks go straight to one file, hashed on the way, so that no more than one is in memory.
    """

    def __init__(self, root: Path, on_bytes: OnBytes | None = None) -> None:
        """Make the unfinished directory under ``root``, which is there and has no checkpoint.

        Args:
            root: the directory of checkpoints.
            on_bytes: told of every part that was written.
        """
        self.root = root
        self._unfinished = root / (directory_name(0) + UNFINISHED)
        self._unfinished.mkdir()
        self._file = _HashedFile((self._unfinished / TENSORS).open("xb"), on_bytes)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, list[Block]] = {}

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def add(self, name: str, whole: tuple[int, ...], offsets: tuple[int, ...], value: Tensor) -> None:
        """Write one block of a tensor.

        Args:
            name: canonical, without ``model.``.
            whole: shape of the whole tensor.
            offsets: of the block in it; no other block of the tensor has them.
            value: the block; kept in fp32.
        """
        key = weight_key(name)
        assert self._shapes.setdefault(key, whole) == whole, (key, whole)
        held = value.to(torch.float32)
        block = write_block(cast(IO[bytes], self._file), TENSORS, offsets, held)
        self._blocks.setdefault(key, []).append(block)

    def finish(
        self,
        config: dict[str, Any],
        tokenizer_fingerprint: str | None,
        files: dict[str, dict[str, Any]] | None = None,
    ) -> Path:
        """Write what else a checkpoint has, and give it its name.

        Args:
            config: the resolved tree.
            tokenizer_fingerprint: of the tokenizer that the model was trained with; None: it is not known, and any may
                be used.
            files: further JSON files by name.

        Returns:
            The checkpoint directory.
        """
        path = self._unfinished
        described = {TENSORS: self._file.finish()}
        for key, blocks in self._blocks.items():
            covered = sum(prod(block.sizes) for block in blocks)
            assert covered == prod(self._shapes[key]), f"{key}: {covered} of {self._shapes[key]} are written"
        write_index(
            path,
            {key: TensorEntry(self._shapes[key], torch.float32, tuple(blocks)) for key, blocks in self._blocks.items()},
        )
        write_format(path)
        state = {"step": 0, "tokens_seen": 0, FINGERPRINT: tokenizer_fingerprint, WEIGHTS_ONLY: True}
        for name, content in {CONFIG: config, STATE: state, **(files or {})}.items():
            write_json(path / name, content)
        for name in (METADATA, COMMON, "metadata.json", CONFIG, STATE, *(files or {})):
            described[name] = describe_file(path / name)
        layout = {**LAYOUT, "zero_stage": 0, "precision": "float32"}
        write_json(path / MANIFEST, build_manifest(0, layout, described))
        return publish(path, self.root, 0)


class _HashedFile:
    """A file that only grows, hashed as it does."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes | None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self._digest = hashlib.sha256()
        self._position = 0

    def tell(self) -> int:
        return self._position

    def write(self, content: Any) -> int:
        self._digest.update(content)
        written = self._file.write(content)
        self._position += written
        if self._on_bytes is not None:
            self._on_bytes(written)
        return written

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._position, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()
