"""The Megatron model of a checkpoint in one process, without an engine: for comparing outputs."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from adamoe_dist import platform
from adamoe_dist.checkpoint import MergedReader, read_config, verify_files
from adamoe_dist.config import Config, config_from_dict, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.model import LanguageModel, build_model, canonical_buffers, parts_of
from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")


@contextlib.contextmanager
def megatron_model(
    checkpoint: Path,
    vocab_size: int,
    rounded: Mapping[str, torch.dtype] | None = None,
    is_verified: bool = False,
) -> Iterator[LanguageModel]:
    """Give the model of a checkpoint with its weights, in fp32 and evaluation mode, on this process's device.

    Args:
        checkpoint: the checkpoint directory.
        vocab_size: rows of the embedding before padding.
        rounded: types that canonical tensors are rounded to, by name; the others are taken as they are.
        is_verified: the checkpoint's files were just compared with their hashes.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if not is_verified:
        verify_files(checkpoint)
    config = _alone(config_from_dict(read_config(checkpoint)))
    resolved = resolve(config, 1)
    launch = Launch(0, 0, 1)
    before = {name: os.environ.pop(name, None) for name in _RENDEZVOUS}
    try:
        initialize_groups(launch, resolved)
        built = build_model(config, resolved, vocab_size, torch.float32, platform.is_cuda())
        _fill(built.model, checkpoint, rounded or {})
        model = built.model.to(platform.device(launch.local_rank))
        model.eval()
        yield model
    finally:
        destroy_groups()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _alone(config: Config) -> Config:
    """Return a tree for one process that trains nothing."""
    tree = config.to_dict()
    tree["parallel"] = Config().to_dict()["parallel"]
    tree["zero"] = Config().to_dict()["zero"]
    tree["train"] |= {"global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"}
    tree["checkpoint"]["load_weights"] = None
    tree["data"] = Config().to_dict()["data"] | {"tokenizer": "none", "train": [{"path": "none"}]}
    tree["moe"]["dispatcher"] = Config().to_dict()["moe"]["dispatcher"]
    return config_from_dict(tree)


@torch.no_grad()
def _fill(model: LanguageModel, checkpoint: Path, rounded: Mapping[str, torch.dtype]) -> None:
    with MergedReader(checkpoint) as reader:
        own = {name: part.parameter for name, part in parts_of(model).items()} | canonical_buffers(model)
        for name, tensor in own.items():
            key = f"model.{name}"
            if key not in reader.index or reader.index[key].shape != tuple(tensor.shape):
                raise UserError(
                    f"{checkpoint}: tensor {key} is missing or has another shape than its configuration says"
                )
            value = reader.read(key, (0,) * tensor.dim(), tuple(tensor.shape))
            tensor.copy_(value.to(rounded.get(name, value.dtype)))
