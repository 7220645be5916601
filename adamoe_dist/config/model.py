"""Section ``model``: the transformer around the experts."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder with rotary positions, RMSNorm, grouped-query attention and SwiGLU feed-forward layers."""

    num_layers: int = key(4, "Number of transformer layers.", at_least=1)
    hidden_size: int = key(128, "Width H of the residual stream.", at_least=1)
    num_attention_heads: int = key(
        4, "Number of query heads; must divide hidden_size where head_dim is null.", at_least=1
    )
    num_query_groups: int | None = key(
        None,
        "Number of key/value heads (grouped-query attention); null means num_attention_heads.",
        at_least=1,
    )
    head_dim: int | None = key(None, "Width of a head, even; null means hidden_size / num_attention_heads.", at_least=2)
    qk_norm: Literal["none", "head", "all"] = key(
        "none",
        "RMSNorm of queries and keys before the rotary positions: of each head by itself (one weight for all heads, "
        "Qwen3), of all heads together (a weight for each element, OLMoE), or none.",
    )
    qkv_bias: bool = key(False, "Give the projections to queries, keys and values a bias (Qwen2), zero at the start.")
    sequence_length: int = key(128, "Tokens a sample (the training context).", at_least=1)
    ffn_hidden_size: int | None = key(
        None,
        "Inner width of the dense feed-forward layers (moe.layer_frequency > 1, moe.dense_layers); null means 4 x "
        "hidden_size.",
        at_least=1,
    )
    rotary_base: int = key(10000, "Base of the rotary position angles.", at_least=1)
    norm_epsilon: float = key(1e-5, "Epsilon of RMSNorm.", above=0)
    tie_embeddings: bool = key(False, "Use the input embedding as output layer too.")
    init_std: float = key(0.02, "Standard deviation of the initial weights.", above=0)
    vocab_size: int | None = key(
        None,
        "Rows of the embedding before padding, at least as many as the tokenizer has ids; null: as many (a model from "
        "elsewhere may have more).",
        at_least=1,
    )
    vocab_size_multiple: int = key(
        128,
        "The vocabulary is padded to a multiple of this (aligned matrix products).",
        at_least=1,
    )

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads
