"""The Megatron model built from a configuration; the room that knows Megatron's versions."""

from adamoe_dist.model.adapters import is_adapter
from adamoe_dist.model.build import BuiltModel, LanguageModel, build_model
from adamoe_dist.model.config import AdaMoETransformerConfig, is_moe_layer, transformer_config
from adamoe_dist.model.modules import CausalAttention, RMSNorm
from adamoe_dist.model.moe_layer import AdaMoELayer
from adamoe_dist.model.parts import (
    Part,
    canonical_buffers,
    forget_logged_losses,
    is_tied_copy,
    part_of,
    parts_of,
    reduction_group,
    replica_of,
)
from adamoe_dist.model.trainable import check_trainable, choose_trained

__all__ = [
    "AdaMoELayer",
    "AdaMoETransformerConfig",
    "BuiltModel",
    "CausalAttention",
    "LanguageModel",
    "Part",
    "RMSNorm",
    "build_model",
    "canonical_buffers",
    "check_trainable",
    "choose_trained",
    "forget_logged_losses",
    "is_adapter",
    "is_moe_layer",
    "is_tied_copy",
    "part_of",
    "parts_of",
    "reduction_group",
    "replica_of",
    "transformer_config",
]
