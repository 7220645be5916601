"""DeepSeek-MoE in the layout of DeepSeek-MoE-16B: fine experts, shared ones that are one wide network, dense layers."""

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
from adamoe_dist.convert.mapping import Names


class DeepSeek(Family):
    """``DeepseekForCausalLM``, whose code comes with its checkpoint (``auto_map``), not with transformers.

    Its later versions (latent attention, groups of experts, scaled weights) are other models.
    """

    model_type = "deepseek"
    architecture = "DeepseekForCausalLM"
    names = Names(
        shared_gate="mlp.shared_experts.gate_proj.weight",
        shared_up="mlp.shared_experts.up_proj.weight",
        shared_down="mlp.shared_experts.down_proj.weight",
    )

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take DeepSeek-MoE's keys."""
        model = read_decoder(given, key_value_heads=False)
        model["ffn_hidden_size"] = given.integer("intermediate_size")
        inner = given.integer("moe_intermediate_size")
        moe = plain_moe(
            given.integer("n_routed_experts"),
            given.integer("num_experts_per_tok"),
            inner,
            given.flag("norm_topk_prob", False),
        )
        shared = given.optional_integer("n_shared_experts")
        moe["shared_expert_hidden_size"] = shared * inner if shared else None
        moe["dense_layers"] = self._dense_layers(given, model["num_layers"])
        given.expect("scoring_func", "softmax")
        given.expect("routed_scaling_factor", 1.0)
        given.expect("topk_method", "greedy")
        given.expect("n_group", 1)
        given.expect("topk_group", 1)
        given.ignore("aux_loss_alpha", "seq_aux", "ep_size")
        return model, moe

    def _dense_layers(self, given: HFConfig, layers: int) -> list[int]:
        first = given.take("first_k_dense_replace") or 0
        if type(first) is not int or first < 0:
            given.refuse("first_k_dense_replace", first, "it must be a whole number")
            first = 0
        frequency = given.integer("moe_layer_freq", 1)
        return [layer for layer in range(layers) if layer < first or layer % frequency]

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return DeepSeek-MoE's keys."""
        shared, inner = config.moe.shared_expert_hidden_size, config.moe.expert_hidden_size
        dense = dense_layers(config)
        return {
            **write_decoder(config, vocab_size, self.model_type, self.architecture),
            "attention_bias": False,
            "first_k_dense_replace": len(dense),
            "intermediate_size": ffn_width(config),
            "moe_intermediate_size": inner,
            "moe_layer_freq": 1,
            "n_routed_experts": config.moe.num_experts,
            "n_shared_experts": shared // inner if shared else None,
            "norm_topk_prob": is_normalized(config),
            "num_experts_per_tok": config.moe.top_k,
            "scoring_func": "softmax",
        }
