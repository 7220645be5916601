"""From and to Hugging Face: families as tables of names, tensors one by one, nothing dropped silently."""

from adamoe_dist.convert.families import FAMILIES, VANILLA, family_of
from adamoe_dist.convert.family import Architecture, Family, meaning
from adamoe_dist.convert.hf_config import HFConfig
from adamoe_dist.convert.mapping import (
    Names,
    Place,
    Weight,
    attention_weights,
    expert_matrix,
    feed_forward_weights,
    layer_prefix,
    stacked,
    standard_weights,
    whole_weight,
)

__all__ = [
    "FAMILIES",
    "VANILLA",
    "Architecture",
    "Family",
    "HFConfig",
    "Names",
    "Place",
    "Weight",
    "attention_weights",
    "expert_matrix",
    "family_of",
    "feed_forward_weights",
    "layer_prefix",
    "meaning",
    "stacked",
    "standard_weights",
    "whole_weight",
]
