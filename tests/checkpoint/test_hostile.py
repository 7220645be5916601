"""A file that would run code when it is unpickled, in the place of each file of a checkpoint: nothing runs it.

The manifest's hashes fit, as those of somebody would who can change one file and therefore any.
"""

import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adamoe_dist.checkpoint import (
    describe_checkpoint,
    find_checkpoint,
    plan_null_experts,
    read_config,
    read_state,
    set_null_experts,
    verify_files,
)
from adamoe_dist.checkpoint.index import METADATA, read_index, read_tensor
from adamoe_dist.checkpoint.manifest import CONFIG, MANIFEST, STATE
from adamoe_dist.errors import UserError
from tests.checkpoint.small import FILES, hostile_bytes, make_checkpoint, plant

IGNORED = {"common.pt", "metadata.json"}
ROUTER = "model.decoder.layers.0.mlp.router.weight"


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_the_bomb_is_one(tmp_path: Path, kind: str) -> None:
    content = tmp_path / "bomb"
    content.write_bytes(hostile_bytes(kind, tmp_path / "marker"))
    pickle.loads(content.read_bytes()) if kind == "pickle" else torch.load(content, weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["pickle", "zip"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_run(tmp_path: Path, tool: ModuleType, name: str, kind: str) -> None:
    marker, root = tmp_path / "marker", tmp_path / "checkpoints"
    path = make_checkpoint(root)
    plant(path, name, hostile_bytes(kind, marker))
    readers = {
        "find": lambda: find_checkpoint(str(path), root) or pytest.fail("none found"),
        "verify": lambda: verify_files(path),
        "config": lambda: read_config(path),
        "state": lambda: read_state(path),
        "index": lambda: read_index(path),
        "tensor": lambda: read_tensor(path, read_index(path), ROUTER),
        "describe": lambda: describe_checkpoint(path),
        "inspect": lambda: tool.main(["inspect", "--from", str(path), "--verify"]),
        "convert": lambda: set_null_experts(path, tmp_path / "to", plan_null_experts(path, 4, 3)),
        "tool": lambda: tool.main(
            f"set-null-experts --from {path} --to {tmp_path / 'by_tool'} --num-null-experts 4 --top-k 3".split()
        ),
    }
    refusals = {}
    for reader, read in readers.items():
        try:
            read()
        except UserError as problem:
            refusals[reader] = str(problem)
    assert not marker.exists()
    expected = {
        METADATA: {"index", "tensor", "describe", "inspect", "convert", "tool"},
        "__0_0.distcp": {"tensor", "convert", "tool"},
        CONFIG: {"config", "describe", "inspect", "convert", "tool"},
        STATE: {"state", "describe", "inspect", "convert", "tool"},
        MANIFEST: readers.keys() - {"config", "state"},
    }
    assert refusals.keys() == expected.get(name, set())
    assert all(name in refusal and "\n" not in refusal for refusal in refusals.values())
    assert name in IGNORED or refusals
