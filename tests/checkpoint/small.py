"""A checkpoint of a few small tensors, made without ranks, and what an attacker could put into one."""

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adamoe_dist.checkpoint.directory import directory_name
from adamoe_dist.checkpoint.index import (
    METADATA,
    read_index,
    write_index,
)
from adamoe_dist.checkpoint.manifest import CONFIG, MANIFEST, STATE, build_manifest, describe_file, write_json
from adamoe_dist.checkpoint.records import Block, TensorEntry
from adamoe_dist.config import config_from_dict
from tests.distributed.cases import merged

EXPERTS, HIDDEN, LAYERS = 4, 8, 2


def tree_of(changes: dict[str, Any]) -> dict[str, Any]:
    base = {
        "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 2},
        "moe": {"num_experts": EXPERTS, "num_null_experts": 0, "top_k": 2},
        "data": {"tokenizer": "unused", "train": [{"path": "unused"}]},
    }
    return config_from_dict(merged(base, changes)).to_dict()


def weights_of(tree: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights and moments under a checkpoint's names: routers, one expert tensor, null rows and constants."""
    draws = torch.Generator().manual_seed(seed)
    moe = tree["moe"]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}.mlp."
        shapes[prefix + "router.weight"] = (EXPERTS, HIDDEN)
        shapes[prefix + "experts.weight1"] = (EXPERTS, 6, HIDDEN)
        if moe["num_null_experts"]:
            rows = 1 if moe["router"]["null_init"] == "shared" else moe["num_null_experts"]
            shapes[prefix + "router.null_weight"] = (rows, HIDDEN)
        if moe["null_types"]["constant"]:
            shapes[prefix + "null_experts.constant"] = (moe["null_types"]["constant"], HIDDEN)
    kinds = ["model", *(["optimizer.exp_avg", "optimizer.exp_avg_sq"] if tree["optimizer"]["type"] == "adamw" else [])]
    tensors = {
        f"{kind}.{name}": torch.randn(shape, generator=draws) for kind in kinds for name, shape in shapes.items()
    }
    return tensors | {"optimizer.step": torch.tensor([3])}


def make_checkpoint(root: Path, changes: dict[str, Any] | None = None, step: int = 3) -> Path:
    """Write one in two files; expert tensors lie half in each."""
    tree = tree_of(changes or {})
    path = root / directory_name(step)
    path.mkdir(parents=True)
    contents = {"__0_0.distcp": io.BytesIO(), "__1_0.distcp": io.BytesIO()}
    index = {}
    for number, (key, value) in enumerate(weights_of(tree).items()):
        parts = value.chunk(2) if "experts.weight" in key else [value]
        blocks, row = [], 0
        for file, part in enumerate(parts, number % 2):
            name = f"__{file % 2}_0.distcp"
            start = contents[name].tell()
            torch.save(part.clone(), contents[name])
            offsets = (row,) + (0,) * (value.dim() - 1)
            blocks.append(Block(offsets, tuple(part.shape), name, start, contents[name].tell() - start))
            row += part.shape[0]
        index[key] = TensorEntry(tuple(value.shape), value.dtype, tuple(blocks))
    for name, content in contents.items():
        (path / name).write_bytes(content.getvalue())
    write_index(path, index)
    torch.save({}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    write_json(path / CONFIG, tree)
    write_json(path / STATE, {"step": step, "tokens_seen": 77, "tokenizer_fingerprint": "abc"})
    sign(path)
    return path


def sign(path: Path) -> None:
    """Write a manifest that fits whatever is there, as somebody who changes a checkpoint would."""
    files = {file.name: describe_file(file) for file in path.iterdir() if file.name != MANIFEST}
    step = int(path.name.removeprefix("iter_"))
    write_json(path / MANIFEST, build_manifest(step, {"world_size": 1}, files))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def hostile_bytes(kind: str, marker: Path) -> bytes:
    """A pickle, or a zip of ``torch.save``, that makes ``marker``."""
    if kind == "pickle":
        return pickle.dumps(Bomb(marker))
    content = io.BytesIO()
    torch.save(Bomb(marker), content)
    return content.getvalue()


def plant(path: Path, name: str, content: bytes) -> None:
    """Put ``content`` in the place of a file; where that has tensors, have the index say that one is all of it."""
    index = read_index(path)
    (path / name).write_bytes(content)
    if name.endswith(".distcp"):
        victim = next(key for key in sorted(index) if key.endswith("mlp.router.weight") and key.startswith("model."))
        entries = {}
        for key, entry in index.items():
            elsewhere = tuple(block for block in entry.blocks if block.file != name)
            if key == victim:
                whole = Block((0,) * len(entry.shape), entry.shape, name, 0, len(content))
                entries[key] = TensorEntry(entry.shape, entry.dtype, (whole,))
            elif len(elsewhere) == len(entry.blocks):
                entries[key] = entry
            else:
                blocks = tuple(
                    replace(block, start=0, length=len(content)) if block.file == name else block
                    for block in entry.blocks
                )
                entries[key] = TensorEntry(entry.shape, entry.dtype, blocks)
        write_index(path, entries)
    if name != MANIFEST:
        sign(path)


FILES = [METADATA, "common.pt", "metadata.json", "__0_0.distcp", CONFIG, STATE, MANIFEST]
