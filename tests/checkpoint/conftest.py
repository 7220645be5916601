"""Checkpoint directories without tensors: what the plain-file side of the room sees."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adamoe_dist.checkpoint.directory import directory_name
from adamoe_dist.checkpoint.manifest import CONFIG, MANIFEST, STATE, build_manifest, describe_file, write_json
from adamoe_dist.config import config_from_dict

Make = Callable[..., Path]


@pytest.fixture
def tree() -> dict[str, Any]:
    data = {"tokenizer": "unused", "train": [{"path": "unused"}]}
    return config_from_dict({"data": data}).to_dict()


@pytest.fixture
def make(tmp_path: Path, tree: dict[str, Any]) -> Make:
    """Make a complete checkpoint of a step under ``tmp_path`` (or another root)."""

    def make_one(step: int, root: Path = tmp_path, name: str | None = None) -> Path:
        path = root / (name or directory_name(step))
        path.mkdir(parents=True)
        (path / "__0_0.distcp").write_bytes(bytes(range(200)))
        write_json(path / CONFIG, tree)
        write_json(path / STATE, {"step": step, "tokenizer_fingerprint": "abc"})
        files = {file.name: describe_file(file) for file in path.iterdir()}
        write_json(path / MANIFEST, build_manifest(step, {"world_size": 1}, files))
        return path

    return make_one


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    """tools/convert_checkpoint.py, to be run in this process."""
    path = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
