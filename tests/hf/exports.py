"""Checkpoints and their exports, made in this process."""

from pathlib import Path
from typing import Any

import torch

from tests.data.conftest import words
from tests.distributed.cases import merged
from tests.hf.pairs import canonical, pair_of

VOCAB_OF_TOKENIZER = 290


def train_small_tokenizer(place: Path) -> Any:
    from adamoe_dist.data import Document, Tokenizer, train_tokenizer

    texts = [Document(words(seed, 400), str(seed)) for seed in range(8)]
    train_tokenizer(texts, VOCAB_OF_TOKENIZER, place)
    return Tokenizer.load(place)


def checkpoint_of(root: Path, changes: dict[str, Any]) -> tuple[Path, Any, Any]:
    """Write the weights of a Megatron model as a checkpoint of a run; return it, the model and its configuration."""
    from adamoe_dist.checkpoint import WeightsWriter

    place = root / "run" / "checkpoints"
    tokenizer = train_small_tokenizer(root / "run" / "tokenizer")
    config, megatron, _ = pair_of(merged(changes, {"data": {"tokenizer": "gone"}}), tokenizer.vocab_size)
    place.mkdir(parents=True)
    with WeightsWriter(place) as writer:
        for name, tensor in canonical(megatron).items():
            writer.add(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach())
        checkpoint = writer.finish(config.to_dict(), tokenizer.fingerprint)
    return checkpoint, megatron, config


def export(source: Path, target: Path, dtype: str | None = None, shard: int | None = None) -> Any:
    from adamoe_dist.convert import export_model, plan_export
    from adamoe_dist.hf import finish_export, write_tokenizer

    plan = plan_export(str(source), dtype, shard)
    export_model(plan, target, write_tokenizer, finish=lambda plan, directory: finish_export(plan, directory, "small"))
    return plan


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from adamoe_dist.checkpoint import read_index, read_tensor

    index = read_index(checkpoint)
    return {key: read_tensor(checkpoint, index, key) for key in index if key.startswith("model.")}
