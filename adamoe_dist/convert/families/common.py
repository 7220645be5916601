"""What the families' ``config.json`` files have in common."""

from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.convert.hf_config import HFConfig

Section = dict[str, Any]


def read_decoder(
    given: HFConfig, epsilon: float = 1e-6, rotary_base: float = 10000.0, key_value_heads: bool = True
) -> Section:
    """Take what every decoder has and return the section ``model``.

    Args:
        given: the keys.
        epsilon: of the norms where the file does not say.
        rotary_base: where the file does not say.
        key_value_heads: the class has a number of its own where the file has none, so that the file must say; false:
            as many as there are query heads.
    """
    heads = given.integer("num_attention_heads")
    hidden = given.integer("hidden_size")
    if key_value_heads and not given.has("num_key_value_heads"):
        groups = given.integer("num_key_value_heads")
    else:
        groups = given.integer("num_key_value_heads", heads)
    return {
        "num_layers": given.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": None if groups == heads else groups,
        "sequence_length": given.integer("max_position_embeddings"),
        "rotary_base": given.rotary_base(rotary_base),
        "norm_epsilon": given.number("rms_norm_eps", epsilon),
        "tie_embeddings": given.flag("tie_word_embeddings", False),
        "init_std": given.number("initializer_range", 0.02),
    }


def read_head_dim(given: HFConfig, model: Section, default: int | None = None) -> None:
    """Take the width of a head into ``model``; null where it is what the other widths give."""
    width = given.optional_integer("head_dim") or default
    plain = model["hidden_size"] / model["num_attention_heads"]
    model["head_dim"] = None if width in (None, plain) else width


def plain_moe(experts: int, top_k: int, inner: int, normalized: bool) -> Section:
    """Return the section ``moe`` of a model without null experts."""
    return {
        "num_experts": experts,
        "num_null_experts": 0,
        "top_k": top_k,
        "expert_hidden_size": inner,
        "router": {"normalize": "true_experts" if normalized else "none"},
    }


def dense_moe(layers: int) -> Section:
    """Return the section ``moe`` of a model without experts."""
    return {"num_experts": 1, "num_null_experts": 0, "top_k": 1, "dense_layers": list(range(layers))}


def write_decoder(config: Config, vocab_size: int, model_type: str, architecture: str) -> Section:
    """Return the keys that every decoder has."""
    model = config.model
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "max_position_embeddings": model.sequence_length,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def is_normalized(config: Config) -> bool:
    """Tell whether combine weights sum to 1, as ``norm_topk_prob`` says."""
    return config.moe.router.normalize in ("true_experts", "all_selected")


def ffn_width(config: Config) -> int:
    """Return the inner width of dense layers, had or not."""
    return config.model.ffn_hidden_size or 4 * config.model.hidden_size


def dense_layers(config: Config) -> list[int]:
    """Return the layers without experts."""
    return [layer for layer in range(config.model.num_layers) if layer not in config.moe_layers]
