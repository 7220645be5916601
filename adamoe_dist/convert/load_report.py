"""How many true experts a checkpoint's model uses on a text, layer by layer, before any training.

Axes: T tokens, E true experts.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamoe_dist.checkpoint import read_config
from adamoe_dist.config import config_from_dict
from adamoe_dist.convert.megatron_model import megatron_model
from adamoe_dist.convert.safetensors_files import read_json
from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError

LONGEST = 1024
MOST_TOKENS = 65536
REPORT = "load_report.json"


@dataclass(frozen=True)
class LayerLoad:
    """What the tokens of a text did at one MoE layer.

    Attributes:
        layer: its number, from 0.
        true_experts_per_token: the load.
        null_share: part of the slots that null experts took.
        all_null_share: part of the tokens that took null experts only.
    """

    layer: int
    true_experts_per_token: float
    null_share: float
    all_null_share: float


def measure_load(checkpoint: Path, vocab_size: int, texts: list[list[int]]) -> list[LayerLoad]:
    """Route texts through the model of a checkpoint in one process; return each MoE layer's load.

    Args:
        checkpoint: the checkpoint directory.
        vocab_size: rows of its embedding before padding.
        texts: token ids of each, from :func:`cut_texts`.
    """
    config = config_from_dict(read_config(checkpoint))
    length = min(LONGEST, config.model.sequence_length)
    counts = torch.zeros(len(config.moe_layers), 3, dtype=torch.float64)
    with torch.no_grad(), megatron_model(checkpoint, vocab_size) as model:
        device = next(model.parameters()).device
        for place, module in enumerate(model.moe_layers):
            module.router.register_forward_hook(_counting(counts[place]))
        for ids in texts:
            for start in range(0, len(ids), length):
                model.logits(torch.tensor([ids[start : start + length]], device=device))
    loads = []
    for layer, (tokens, true_slots, all_null) in zip(config.moe_layers, counts.tolist(), strict=True):
        load = true_slots / tokens
        loads.append(LayerLoad(layer, load, 1.0 - load / config.moe.top_k, all_null / tokens))
    return loads


def cut_texts(tokenizer: Path, files: list[Path]) -> list[list[int]]:
    """Return the token ids of each file, together at most :data:`MOST_TOKENS`.

    Args:
        tokenizer: the directory of the tokenizer.
        files: texts.

    Raises:
        UserError: a text or the tokenizer cannot be read, or a text has no tokens.
    """
    cut, left, texts = Tokenizer.load(tokenizer), MOST_TOKENS, []
    for file in files:
        ids = cut.encode(read_text(file))
        if not ids:
            raise UserError(f"--text {file} has no tokens; give another")
        texts.append(ids[:left])
        left -= len(texts[-1])
    return texts


def keep_load_report(checkpoint: Path, texts: list[str], tokens: int, loads: list[LayerLoad]) -> None:
    """Write beside a checkpoint what :func:`measure_load` returned, with the texts' names; model cards take it up."""
    report = {
        "checkpoint": checkpoint.name,
        "texts": [Path(text).name for text in texts],
        "tokens": tokens,
        "layers": [asdict(load) for load in loads],
    }
    (checkpoint.parent / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_load_report(checkpoint: Path) -> dict[str, Any] | None:
    """Return what was kept of the load of a checkpoint's model on texts; None: nothing was."""
    file = checkpoint.absolute().parent / REPORT
    report = read_json(file) if file.is_file() else {}
    return report if report.get("checkpoint") == checkpoint.name else None


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: it cannot be read as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--text {file} cannot be read as UTF-8 text ({problem}); give a text file") from None


def _counting(counts: Tensor) -> Any:
    """Return a hook on a router that adds tokens, their true slots and those without any to ``counts`` (3,)."""

    def count(_: Any, __: Any, outputs: tuple[Tensor, Tensor]) -> None:
        loads_T = outputs[1].sum(dim=1)
        counts.add_(torch.stack([torch.ones_like(loads_T).sum(), loads_T.sum(), (loads_T == 0).sum()]).double().cpu())

    return count
