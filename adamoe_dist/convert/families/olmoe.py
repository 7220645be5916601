"""OLMoE: norms over the whole width of queries and keys; plain scores as weights unless the file says otherwise."""

from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.convert.families.common import is_normalized, plain_moe, read_decoder, write_decoder
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.hf_config import HFConfig


class OLMoE(Family):
    """``OlmoeForCausalLM``; its ``intermediate_size`` is an expert's."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take OLMoE's keys."""
        model = read_decoder(given, epsilon=1e-5, key_value_heads=False) | {"qk_norm": "all"}
        experts = given.integer("num_local_experts" if given.has("num_local_experts") else "num_experts")
        top_k, inner = given.integer("num_experts_per_tok"), given.integer("intermediate_size")
        return model, plain_moe(experts, top_k, inner, given.flag("norm_topk_prob", False))

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return OLMoE's keys."""
        return {
            **write_decoder(config, vocab_size, self.model_type, self.architecture),
            "attention_bias": False,
            "clip_qkv": None,
            "intermediate_size": config.moe.expert_hidden_size,
            "norm_topk_prob": is_normalized(config),
            "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "output_router_logits": False,
            "pad_token_id": None,
            "router_aux_loss_coef": 0.01,
        }
