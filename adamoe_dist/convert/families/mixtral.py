"""Mixtral: softmax over all experts, the chosen ones' weights renormalised."""

from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.convert.families.common import plain_moe, read_decoder, read_head_dim, write_decoder
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.hf_config import HFConfig
from adamoe_dist.convert.mapping import Names


class Mixtral(Family):
    """``MixtralForCausalLM``; its ``w1`` is the gate, ``w3`` the up and ``w2`` the down projection."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    names = Names(
        router="block_sparse_moe.gate.weight",
        expert_gate="block_sparse_moe.experts.{expert}.w1.weight",
        expert_up="block_sparse_moe.experts.{expert}.w3.weight",
        expert_down="block_sparse_moe.experts.{expert}.w2.weight",
    )

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take Mixtral's keys."""
        model = read_decoder(given, epsilon=1e-5, rotary_base=1e6)
        read_head_dim(given, model)
        given.full_attention(model["sequence_length"])
        experts, top_k = given.integer("num_local_experts"), given.integer("num_experts_per_tok")
        return model, plain_moe(experts, top_k, given.integer("intermediate_size"), normalized=True)

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return Mixtral's keys."""
        return {
            **write_decoder(config, vocab_size, self.model_type, self.architecture),
            "head_dim": config.model.head_width,
            "intermediate_size": config.moe.expert_hidden_size,
            "num_experts_per_tok": config.moe.top_k,
            "num_local_experts": config.moe.num_experts,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
        }
