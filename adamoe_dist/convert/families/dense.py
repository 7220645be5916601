"""Dense decoders: what an upcycled model starts from."""

from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.convert.families.common import dense_moe, ffn_width, read_decoder, read_head_dim, write_decoder
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.hf_config import HFConfig

QWEN3_HEAD_DIM = 128


class Llama(Family):
    """``LlamaForCausalLM``."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    is_dense = True

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take Llama's keys."""
        model = read_decoder(given, key_value_heads=False)
        read_head_dim(given, model)
        model["ffn_hidden_size"] = given.integer("intermediate_size")
        given.expect("rope_interleaved", False)
        given.ignore("is_llama_config")
        return model, dense_moe(model["num_layers"])

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return Llama's keys."""
        decoder = write_decoder(config, vocab_size, self.model_type, self.architecture)
        return {**decoder, "head_dim": config.model.head_width, "intermediate_size": ffn_width(config)}


class Mistral(Llama):
    """``MistralForCausalLM``."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take Mistral's keys; without a word in the file its window is 4096 tokens."""
        if not given.mentions("sliding_window"):
            given.put("sliding_window", 4096)
        model, moe = super().read_sections(given)
        given.full_attention(model["sequence_length"])
        return model, moe

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return Mistral's keys."""
        return {**super().write(config, vocab_size), "sliding_window": None}


class Qwen3(Family):
    """``Qwen3ForCausalLM``."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    is_dense = True

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take Qwen3's keys."""
        model = read_decoder(given)
        read_head_dim(given, model, QWEN3_HEAD_DIM)
        given.full_attention(model["sequence_length"], given.flag("use_sliding_window", False))
        given.ignore("max_window_layers")
        model |= {"qk_norm": "head", "ffn_hidden_size": given.integer("intermediate_size")}
        return model, dense_moe(model["num_layers"])

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return Qwen3's keys."""
        return {
            **write_decoder(config, vocab_size, self.model_type, self.architecture),
            "attention_bias": False,
            "head_dim": config.model.head_width,
            "intermediate_size": ffn_width(config),
            "sliding_window": None,
            "use_sliding_window": False,
        }
