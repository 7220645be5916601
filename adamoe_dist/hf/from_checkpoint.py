"""A checkpoint straight into the transformers class, in memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.console import progress
from adamoe_dist.errors import UserError
from adamoe_dist.hf.configuration_adamoe import AdaMoEConfig
from adamoe_dist.hf.modeling_adamoe import AdaMoEForCausalLM

if TYPE_CHECKING:
    from adamoe_dist.checkpoint import RegionReader
    from adamoe_dist.convert import Weight

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
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
        device_map: None: CPU; a device; or as in transformers "auto", "balanced", "balanced_low_0", "sequential", or a
            map of modules to devices without "disk".

    Raises:
        UserError: there is no complete checkpoint, or it cannot be read.
    """
    platform.prepare()
    from adamoe_dist.checkpoint import RegionReader, checkpoint_at, read_config
    from adamoe_dist.convert import read_weight

    source = checkpoint_at(str(path), "checkpoint")
    config = config_from_dict(read_config(source))
    with RegionReader(source) as reader:
        if EMBEDDING not in reader.index:
            raise UserError(f"{source} has no tensor {EMBEDDING}; choose another checkpoint")
        rows = reader.index[EMBEDDING].shape[0]
        model, weights = empty_model(config, config.model.vocab_size or rows, dtype), class_weights(config, rows)
        _refuse_others(source, reader, weights)
        places = _places(model, device_map)
        with progress(len(weights), "tensor", f"read {source.name}") as bar:
            for weight in weights:
                _put(model, weight.name, read_weight(reader, weight), _device_of(weight.name, places))
                bar.update()
    model.tie_weights()
    if len(set(places.values())) > 1:
        from accelerate import dispatch_model

        dispatch_model(model, places)
    return model.eval()


def class_weights(config: Config, vocab_size: int) -> "list[Weight]":
    """Return the tensors of the class for a model of ``config``, each with its place in the canonical ones."""
    from adamoe_dist.convert import FAMILIES

    family = FAMILIES[AdaMoEConfig.model_type]
    return [weight for weight in family.weights(config, config.model.vocab_size or vocab_size) if not weight.is_copy]


def empty_model(config: Config, vocab_size: int, dtype: torch.dtype) -> AdaMoEForCausalLM:
    """Return a model of a tree without storage for its weights; ``vocab_size`` is before padding."""
    from adamoe_dist.convert import FAMILIES

    values = FAMILIES[AdaMoEConfig.model_type].write(config, vocab_size)
    with torch.device("meta"):
        model = AdaMoEForCausalLM(AdaMoEConfig.from_dict(values))
    model.config.dtype = dtype
    return model.to(dtype)


def _refuse_others(source: Path, reader: "RegionReader", weights: "list[Weight]") -> None:
    """Refuse a checkpoint that lacks a tensor or has one that its model has not."""
    present = {key for key in reader.index if key.startswith(PREFIX)}
    wanted = {PREFIX + weight.tensor: weight.whole for weight in weights}
    for key in sorted(present ^ wanted.keys()):
        problem = "lacks tensor" if key in wanted else "has a tensor that its configuration does not give it:"
        raise UserError(f"{source} {problem} {key}; choose another checkpoint")
    for key, shape in wanted.items():
        if reader.index[key].shape != shape:
            raise UserError(f"{source}: {key} has shape {reader.index[key].shape}, its configuration makes it {shape}")


def _places(model: AdaMoEForCausalLM, device_map: DeviceMap | None) -> Devices:
    """Return the device of each module by the beginning of its name; "" is all of them."""
    if device_map is None:
        return {"": torch.device("cpu")}
    if isinstance(device_map, str):
        if device_map not in DEVICE_MAPS:
            return {"": torch.device(device_map)}
        device_map = _spread(model, device_map)
    if "disk" in device_map.values():
        raise UserError(
            "device_map sends weights to disk, which needs files; export the checkpoint and load the export with "
            "from_pretrained"
        )
    return {name: torch.device(device) for name, device in device_map.items()}


def _spread(model: AdaMoEForCausalLM, how: str) -> dict[str, Any]:
    """Return accelerate's map over the devices there are, as from_pretrained does."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())
    memory = None
    if how != "sequential":
        memory = get_balanced_memory(model, no_split_module_classes=whole, low_zero=how == "balanced_low_0")
    spread: dict[str, Any] = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    return spread


def _device_of(name: str, places: Devices) -> torch.device:
    fitting = [place for place in places if not place or name == place or name.startswith(f"{place}.")]
    if not fitting:
        raise UserError(f"device_map has no device for {name}; name its module, or give 'auto'")
    return places[max(fitting, key=len)]


def _put(model: AdaMoEForCausalLM, name: str, value: Tensor, device: torch.device) -> None:
    """Give a weight or buffer of ``model`` its value."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    present = getattr(module, leaf)
    moved = value.to(device=device, dtype=present.dtype)
    setattr(module, leaf, torch.nn.Parameter(moved) if isinstance(present, torch.nn.Parameter) else moved)
