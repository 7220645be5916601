"""A checkpoint's and a Hugging Face directory's logits of the same tokens."""

import os
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from tests.convert.models import VOCAB


def tokens_of(seed: int = 0, length: int = 24) -> Tensor:
    """(1, S) ids."""
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def checkpoint_logits(checkpoint: Path, tokens: Tensor) -> Tensor:
    """(1, S, V) of the Megatron model."""
    from adamoe_dist import platform

    platform.prepare()
    from adamoe_dist.convert import megatron_model

    with mock.patch.dict(os.environ):
        os.environ.pop("MASTER_PORT", None)
        with megatron_model(checkpoint, VOCAB) as model:
            return model.logits(tokens)[:, :, :VOCAB]


@torch.no_grad()
def hf_logits(directory: Path, tokens: Tensor) -> Tensor:
    """(1, S, V) of transformers' own class."""
    from transformers import AutoModelForCausalLM

    logits: Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits
    return logits


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by canonical name."""
    from adamoe_dist.checkpoint import RegionReader

    with RegionReader(checkpoint) as reader:
        return {
            key.removeprefix("model."): reader.read(key, (0,) * len(entry.shape), entry.shape)
            for key, entry in reader.index.items()
        }
