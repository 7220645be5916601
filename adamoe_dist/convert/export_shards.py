"""In which type and in which file an export writes each tensor."""

import torch

from adamoe_dist.convert.hf_directory import CONFIG_FILE, SINGLE
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.origin import Origin
from adamoe_dist.convert.safetensors_files import read_json


def types_of(weights: list[Weight], origin: Origin | None, asked: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the type of each tensor by its name.

    Args:
        weights: the tensors.
        origin: of an imported model: a tensor has the type that it had there, and one that was added later, such as
            null experts' rows, that of the weight that its module had there. What has neither is fp32.
        asked: the type of all tensors but those that stay fp32; None: as said.
    """
    imported = {} if origin is None else _imported_types(origin)

    def kind(weight: Weight) -> torch.dtype:
        if asked is not None and not weight.stays_fp32:
            return asked
        if origin is not None and weight.name in origin.tensors:
            return origin.tensors[weight.name][0]
        beside = "" if weight.stays_fp32 else weight.tensor.rpartition(".")[0] + ".weight"
        return imported.get(weight.tensor, imported.get(beside, torch.float32))

    return {weight.name: kind(weight) for weight in weights}


def _imported_types(origin: Origin) -> dict[str, torch.dtype]:
    """Return the type of each canonical tensor: the narrowest that holds all its parts as they were imported."""
    if not origin.tensors:
        return {}
    config = origin.family.read(read_json(origin.files / CONFIG_FILE)).config()
    kinds: dict[str, torch.dtype] = {}
    for weight in origin.family.weights(config, origin.vocab_size):
        if weight.name in origin.tensors:
            own = origin.tensors[weight.name][0]
            kinds[weight.tensor] = torch.promote_types(kinds.get(weight.tensor, own), own)
    return kinds


def old_shards(
    weights: list[Weight], types: dict[str, torch.dtype], known: dict[str, tuple[torch.dtype, str]]
) -> dict[str, list[tuple[Weight, torch.dtype]]]:
    """Return the tensors of each file as they lay there at import."""
    by_name = {weight.name: weight for weight in weights}
    shards: dict[str, list[tuple[Weight, torch.dtype]]] = {}
    for name, (_, file) in known.items():
        shards.setdefault(file, []).append((by_name[name], types[name]))
    return shards


def new_shards(
    weights: list[Weight], types: dict[str, torch.dtype], most: int
) -> dict[str, list[tuple[Weight, torch.dtype]]]:
    """Fill files of at most ``most`` bytes in the order of the layers; a tensor that is larger has one for itself."""
    parts: list[list[tuple[Weight, torch.dtype]]] = [[]]
    size = 0
    for weight in weights:
        nbytes = weight.elements * types[weight.name].itemsize
        if parts[-1] and size + nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append((weight, types[weight.name]))
        size += nbytes
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}
