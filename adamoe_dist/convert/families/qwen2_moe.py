"""Qwen2-MoE: biases of queries, keys and values, and a shared expert behind a gate of its own."""

from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.convert.families.common import (
    dense_layers,
    ffn_width,
    is_normalized,
    plain_moe,
    read_decoder,
    write_decoder,
)
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.hf_config import HFConfig


class Qwen2MoE(Family):
    """``Qwen2MoeForCausalLM``, also Qwen1.5-MoE."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take Qwen2-MoE's keys."""
        model = read_decoder(given, key_value_heads=False)
        given.full_attention(model["sequence_length"], given.flag("use_sliding_window", False))
        given.ignore("max_window_layers")
        model["qkv_bias"] = given.flag("qkv_bias", True)
        model["ffn_hidden_size"] = given.integer("intermediate_size")
        moe = plain_moe(
            given.integer("num_experts"),
            given.integer("num_experts_per_tok"),
            given.integer("moe_intermediate_size"),
            given.flag("norm_topk_prob", False),
        )
        moe["shared_expert_hidden_size"] = given.integer("shared_expert_intermediate_size")
        moe["shared_expert_gate"] = True
        moe["layer_frequency"] = given.integer("decoder_sparse_step", 1)
        moe["dense_layers"] = sorted(given.integers("mlp_only_layers"))
        return model, moe

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return Qwen2-MoE's keys."""
        return {
            **write_decoder(config, vocab_size, self.model_type, self.architecture),
            "decoder_sparse_step": 1,
            "intermediate_size": ffn_width(config),
            "mlp_only_layers": dense_layers(config),
            "moe_intermediate_size": config.moe.expert_hidden_size,
            "norm_topk_prob": is_normalized(config),
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "output_router_logits": False,
            "qkv_bias": config.model.qkv_bias,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": config.moe.shared_expert_hidden_size or 1,
            "sliding_window": None,
            "use_sliding_window": False,
        }
