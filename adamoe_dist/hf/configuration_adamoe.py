"""Configuration of an AdaMoE language model for transformers.

This file is saved beside exported weights, so it imports nothing but transformers.
"""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig


class AdaMoEConfig(PreTrainedConfig):
    """A decoder whose tokens choose how many experts they use (AdaMoE, arXiv 2406.13233).

    Attributes:
        vocab_size: rows of the embedding; may be more than the tokenizer has ids.
        hidden_size: width H of the residual stream.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; None: as many as query heads.
        head_dim: width of a head; None: hidden_size / num_attention_heads.
        qk_norm: RMSNorm of queries and keys: "none", "head" (over each head's width) or "all" (over all heads' width).
        qkv_bias: whether the projections of queries, keys and values have biases.
        max_position_embeddings: the length of the samples in training.
        rope_parameters: {"rope_type": "default", "rope_theta": base of the rotary angles}.
        rms_norm_eps: epsilon of RMSNorm.
        initializer_range: standard deviation of new weights.
        tie_word_embeddings: whether the output layer is the embedding.
        intermediate_size: inner width of dense feed-forward layers.
        layer_frequency: one layer in so many has experts, the last of each group.
        dense_layers: numbers from 0 of further layers that have a dense feed-forward.
        num_experts: n, true experts of a layer.
        num_null_experts: m, null experts of a layer.
        num_experts_per_tok: k, slots that a token fills with true or null experts.
        moe_intermediate_size: inner width of a true expert.
        shared_expert_intermediate_size: inner width of an expert that every token uses besides; None: there is none.
        shared_expert_gate: whether a sigmoid of the token scales the shared expert's output.
        score_function: "softmax" over all n + m logits, or "sigmoid" of each.
        normalize: over what combine weights sum to 1: "true_experts" selected, "all_selected", "all_true" experts,
            selected or not, or "none": the plain scores.
        shared_null_row: whether one router row scores all null experts.
        null_init: how the rows were drawn that score null experts: "copy" of the true experts', "shared" or "random";
            None: not recorded. It is of the past: nothing is computed from it.
        num_identity_experts: null experts that return the token.
        num_constant_experts: null experts that return a mixture of the token and a learned vector; the last columns.
        gating_residual: whether each router adds a learned map of the previous router's logits.
        target_load: true experts a token that training held by a bias on the true experts' scores, which acts on the
            choice alone; None: there is no such bias.
        capacity_factor: beyond which training dropped tokens of an expert; here no token is dropped. None: none was.
        router_balance: balance loss: "null_averaged" (equation 6), "grouped", "switch" or "none".
        router_aux_loss_coef: its weight in the loss.
        router_target_null_share: part of the slots that "grouped" gives to null experts; None: m / (n + m).
        router_z_loss_coef: weight of the mean squared log-sum-exp of the router's logits.
        output_router_logits: whether logits of the routers are returned, and their losses added where labels are given.
        use_cache: whether keys and values are returned for the next call.
        tokenizer_vocab_size: ids that the tokenizer has; further rows of the embedding only fill it up.
        vocab_size_multiple: what training filled it up to a multiple of.
    """

    model_type = "adamoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta = 10000.0

    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: str = "none"
    qkv_bias: bool = False
    max_position_embeddings: int = 128
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    intermediate_size: int | None = None
    layer_frequency: int = 1
    dense_layers: list[int] | None = None
    num_experts: int = 8
    num_null_experts: int = 8
    num_experts_per_tok: int = 3
    moe_intermediate_size: int = 256
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    score_function: str = "softmax"
    normalize: str = "true_experts"
    shared_null_row: bool = False
    null_init: str | None = None
    num_identity_experts: int = 0
    num_constant_experts: int = 0
    gating_residual: bool = False
    target_load: float | None = None
    capacity_factor: float | None = None
    router_balance: str = "null_averaged"
    router_aux_loss_coef: float = 0.02
    router_target_null_share: float | None = None
    router_z_loss_coef: float = 0.0
    output_router_logits: bool = False
    use_cache: bool = True
    tokenizer_vocab_size: int | None = None
    vocab_size_multiple: int = 1
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other values, and refuse what no model has."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.dense_layers = list(self.dense_layers or [])
        super().__post_init__(**kwargs)
        self._check()

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dense_width(self) -> int:
        """Inner width of a dense feed-forward layer."""
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def rotary_base(self) -> float:
        """Base of the rotary angles."""
        return float((self.rope_parameters or {}).get("rope_theta", self.default_theta))

    def has_experts(self, layer: int) -> bool:
        """Tell whether layer ``layer`` (from 0) is a mixture-of-experts layer."""
        return (layer + 1) % self.layer_frequency == 0 and layer not in (self.dense_layers or [])

    @property
    def _null_outputs(self) -> int:
        return self.num_identity_experts + self.num_constant_experts

    def _check(self) -> None:
        choices = {
            "qk_norm": ("none", "head", "all"),
            "score_function": ("softmax", "sigmoid"),
            "normalize": ("true_experts", "all_selected", "all_true", "none"),
            "router_balance": ("null_averaged", "grouped", "switch", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        if not 0 < self.num_experts_per_tok <= self.num_experts + self.num_null_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and the "
                f"{self.num_experts + self.num_null_experts} true and null experts"
            )
        if self._null_outputs > self.num_null_experts:
            raise ValueError(
                f"num_identity_experts={self.num_identity_experts} and num_constant_experts={self.num_constant_experts}"
                f" are more than num_null_experts={self.num_null_experts}"
            )
        if self.normalize == "all_true" and (self.score_function != "softmax" or self._null_outputs):
            raise ValueError("normalize='all_true' is for score_function='softmax' and null experts without an output")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(f"rope_parameters: rope_type={rope_type!r} is not known to this model; use 'default'")


__all__ = ["AdaMoEConfig"]
