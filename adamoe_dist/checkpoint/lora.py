"""Low-rank adapters taken into the weights that they belong to, by canonical name; pure functions of whole tensors.

Legend: E experts, O output width, I input width, r rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamoe_dist.model import is_adapter

_OF_EXPERTS = {"weight1": ("lora.a1", "lora.b1"), "weight2": ("lora.a2", "lora.b2")}
_OF_LINEAR = ("lora.a", "lora.b")


def adapters_of(name: str) -> tuple[str, str]:
    """Return the canonical names that the adapters A and B of weight ``name`` would have."""
    layer, _, leaf = name.rpartition(".")
    a, b = _OF_EXPERTS.get(leaf, _OF_LINEAR) if layer.endswith(".experts") else _OF_LINEAR
    return f"{layer}.{a}", f"{layer}.{b}"


def may_be_adapted(name: str) -> bool:
    """Tell whether a canonical name is that of a matrix, which may have adapters: a bias beside it has none."""
    return name.endswith((".weight", ".weight1", ".weight2"))


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return ``W + alpha/r B A``, computed in fp32 or in W's precision if that is higher.

    Args:
        weight: (O, I), or (E, O, I) of stacked experts.
        a: (r, I) or (E, r, I).
        b: (O, r) or (E, O, r).
        alpha: ``finetune.lora.alpha``.
    """
    precision = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(precision) + (alpha / a.shape[-2]) * (b.to(precision) @ a.to(precision))


def merge_lora(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Take all adapters into their weights: the model without adapters that gives the same outputs.

    Args:
        tensors: whole weights by canonical name (with or without the prefix ``model.``); those without adapters, and
            all of a model that has none, are returned as they are.
        alpha: ``finetune.lora.alpha`` of the run that trained the adapters.

    Returns:
        The weights without the adapters.
    """
    merged, used = {}, set()
    for name, weight in tensors.items():
        if is_adapter(name):
            continue
        a, b = adapters_of(name)
        if may_be_adapted(name) and a in tensors:
            merged[name] = merged_weight(weight, tensors[a], tensors[b], alpha)
            used |= {a, b}
        else:
            merged[name] = weight
    left = {name for name in tensors if is_adapter(name)} - used
    assert not left, f"adapters without a weight: {sorted(left)[:3]}"
    return merged
