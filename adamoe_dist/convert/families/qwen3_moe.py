"""Qwen3-MoE: norms of each head's queries and keys, dense layers among those with experts."""

from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.convert.families.common import (
    dense_layers,
    ffn_width,
    is_normalized,
    plain_moe,
    read_decoder,
    read_head_dim,
    write_decoder,
)
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.hf_config import HFConfig


class Qwen3MoE(Family):
    """``Qwen3MoeForCausalLM``."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take Qwen3-MoE's keys; transformers 5 says ``num_local_experts`` for ``num_experts``."""
        model = read_decoder(given)
        read_head_dim(given, model)
        given.full_attention(model["sequence_length"], given.flag("use_sliding_window", False))
        given.ignore("max_window_layers")
        model |= {"qk_norm": "head", "ffn_hidden_size": given.integer("intermediate_size")}
        experts = given.integer("num_local_experts" if given.has("num_local_experts") else "num_experts")
        moe = plain_moe(
            experts,
            given.integer("num_experts_per_tok"),
            given.integer("moe_intermediate_size"),
            given.flag("norm_topk_prob", False),
        )
        moe["layer_frequency"] = given.integer("decoder_sparse_step", 1)
        moe["dense_layers"] = sorted(given.integers("mlp_only_layers"))
        return model, moe

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return Qwen3-MoE's keys."""
        return {
            **write_decoder(config, vocab_size, self.model_type, self.architecture),
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": config.model.head_width,
            "intermediate_size": ffn_width(config),
            "mlp_only_layers": dense_layers(config),
            "moe_intermediate_size": config.moe.expert_hidden_size,
            "norm_topk_prob": is_normalized(config),
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        }
