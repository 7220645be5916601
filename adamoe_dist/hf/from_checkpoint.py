"""A checkpoint straight into the transformers class, in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.console import progress
from adamoe_dist.errors import UserError
from adamoe_dist.hf.configuration_adamoe import AdaMoEConfig
from adamoe_dist.hf.modeling_adamoe import AdaMoEForCausalLM

DeviceMap = str | dict[str, Any]
Devices = dict[str, torch.device]
PREFIX = "model."
EMBEDDING = f"{PREFIX}embedding.word_embeddings.weight"


def model_from_checkpoint(
    path: str | Path, dtype: torch.dtype = torch.float32, device_map: DeviceMap | None = None
) -> AdaMoEForCausalLM:
    """Return the model of a checkpoint, ready to generate, without writing files.

    One tensor at a time is read; an optimizer's state is left where it is.

    Args:
        path: a checkpoint, a directory of checkpoints or a run directory, whose last complete one is meant.
        dtype: of the weights; a selection bias stays fp32.
        device_map: None: CPU; "auto" or a map of modules to devices as in transformers, without "disk".

    Raises:
        UserError: there is no complete checkpoint, or it cannot be read.
    """
    platform.prepare()
    from adamoe_dist.checkpoint import checkpoint_at, read_config, read_index, read_manifest, read_tensor
    from adamoe_dist.hf.from_tree import class_tensors

    source = checkpoint_at(str(path), "checkpoint")
    config, index = config_from_dict(read_config(source)), read_index(source)
    if EMBEDDING not in index:
        raise UserError(f"{source} has no tensor {EMBEDDING}; choose another checkpoint")
    model = empty_model(config, index[EMBEDDING].shape[0], read_manifest(source)["step"], dtype)
    places = _places(model, device_map)
    keys = [key for key in index if key.startswith(PREFIX)]
    with progress(len(keys), "tensor", f"read {source.name}") as bar:
        for key in keys:
            for name, value in class_tensors(key.removeprefix(PREFIX), read_tensor(source, index, key), config):
                _put(model, name, value, _device_of(name, places), source)
            bar.update()
    model.tie_weights()
    _refuse_missing(model, source)
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, places)
    return model.eval()


def empty_model(config: Config, vocab_size: int, step: int, dtype: torch.dtype) -> AdaMoEForCausalLM:
    """Return a model of a tree without storage for its weights.

    Args:
        config: the tree.
        vocab_size: rows of the embedding.
        step: see ``class_values``.
        dtype: of the weights.
    """
    from adamoe_dist.hf.from_tree import class_values

    with torch.device("meta"):
        model = AdaMoEForCausalLM(AdaMoEConfig(**class_values(config, vocab_size, step)))
    model.config.dtype = dtype
    return model.to(dtype)


def _places(model: AdaMoEForCausalLM, device_map: DeviceMap | None) -> Devices:
    """Return the device of each module by the beginning of its name; "" is all of them."""
    if device_map is None:
        return {"": torch.device("cpu")}
    if isinstance(device_map, str):
        if device_map != "auto":
            return {"": torch.device(device_map)}
        from accelerate import infer_auto_device_map

        device_map = infer_auto_device_map(model, no_split_module_classes=list(model._no_split_modules))
    if "disk" in device_map.values():
        raise UserError(
            "device_map sends weights to disk, which needs files; export the checkpoint and load that with from_pretrained"
        )
    return {name: torch.device(device) for name, device in device_map.items()}


def _device_of(name: str, places: Devices) -> torch.device:
    fitting = [place for place in places if not place or name == place or name.startswith(f"{place}.")]
    if not fitting:
        raise UserError(f"device_map has no device for {name}; name its module, or give 'auto'")
    return places[max(fitting, key=len)]


def _put(model: AdaMoEForCausalLM, name: str, value: Tensor, device: torch.device, source: Path) -> None:
    """Give a weight or buffer of ``model`` its value."""
    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        present = getattr(module, leaf)
    except AttributeError:
        present = None
    if present is None or present.shape != value.shape:
        there = "no such tensor" if present is None else f"one of shape {tuple(present.shape)}"
        raise UserError(f"{source} has {name} of shape {tuple(value.shape)}, but its configuration gives {there}")
    moved = value.to(device=device, dtype=present.dtype, copy=True).contiguous()
    setattr(module, leaf, torch.nn.Parameter(moved) if isinstance(present, torch.nn.Parameter) else moved)


def _refuse_missing(model: AdaMoEForCausalLM, source: Path) -> None:
    missing = sorted(name for name, value in model.state_dict().items() if value.is_meta)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors of its model, first {missing[0]}; choose another")
