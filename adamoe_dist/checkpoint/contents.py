"""What a checkpoint holds, from its plain files and its index; no process group, no accelerator, no tensor read."""

import datetime
import math
from pathlib import Path
from typing import Any

from adamoe_dist.checkpoint.directory import find_checkpoint
from adamoe_dist.checkpoint.index import read_index
from adamoe_dist.checkpoint.manifest import MANIFEST, read_config, read_manifest, read_state
from adamoe_dist.config import config_from_dict


def checkpoint_at(place: str, key: str) -> Path:
    """Return the complete checkpoint that a path means: one itself, or the last in a directory of them or in a run.

    Args:
        place: the path as it was given.
        key: the option that it was given to, for messages.

    Raises:
        UserError: there is no complete checkpoint.
    """
    found = find_checkpoint(str(Path(place).absolute()), Path(), key=key)
    assert found is not None, place
    return found


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return what the checkpoint directory ``path`` holds as plain values.

    Raises:
        UserError: one of its files is missing or not what it should be.
    """
    manifest, config, state, index = read_manifest(path), read_config(path), read_state(path), read_index(path)
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    saved = datetime.datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, datetime.UTC)
    weights = [entry for key, entry in index.items() if key.startswith("model.")]
    return {
        "path": str(path),
        "step": manifest["step"],
        "saved": saved.isoformat(timespec="seconds"),
        "tokens_seen": state.get("tokens_seen"),
        "layout": manifest["layout"],
        "versions": manifest["versions"],
        "model": _sizes(config),
        "parameters": sum(math.prod(entry.shape) for entry in weights),
        "bytes": sum(files.values()),
        "files": files,
        "tensors": {
            key: {"shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch.")}
            for key, entry in sorted(index.items())
        },
    }


def _sizes(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration keys that say which model it is."""
    config = config_from_dict(tree)
    model, moe = config.model, config.moe
    return {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.head_dim": model.head_dim,
        "model.qk_norm": model.qk_norm,
        "model.qkv_bias": model.qkv_bias,
        "model.sequence_length": model.sequence_length,
        "moe.num_experts": moe.num_experts,
        "moe.num_null_experts": moe.num_null_experts,
        "moe.top_k": moe.top_k,
        "moe.expert_hidden_size": moe.expert_hidden_size,
        "moe.shared_expert_gate": moe.shared_expert_gate,
        "moe.layer_frequency": moe.layer_frequency,
        "moe.dense_layers": moe.dense_layers,
        "moe.router.null_init": moe.router.null_init,
        "moe.router.target_load": moe.router.target_load,
        "optimizer.type": config.optimizer.type,
        "run.name": config.run.name,
    }
