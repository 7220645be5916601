"""From this project's configuration and canonical tensors to those of the transformers class, without files.

Axes: G key and value heads, Q query heads of each, D width of a head, H hidden.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from adamoe_dist.config import Config
from adamoe_dist.errors import UserError
from adamoe_dist.routing import annealed_coefficient

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.experts.weight1": "mlp.experts.gate_up_proj",
    "mlp.experts.weight2": "mlp.experts.down_proj",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.null_weight": "mlp.router.null_weight",
    "mlp.router.gating_residual_weight": "mlp.router.gating_residual_weight",
    "mlp.router.expert_bias": "mlp.router.expert_bias",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    "mlp.null_experts.mixture_weight": "mlp.null_experts.mixture_weight",
    "mlp.null_experts.constant": "mlp.null_experts.constant",
}


def class_values(config: Config, vocab_size: int, step: int | None = None) -> dict[str, Any]:
    """Return the values of AdaMoEConfig for a model of ``config``.

    Args:
        config: the tree.
        vocab_size: rows of the embedding.
        step: the step whose coefficient of the balance loss is kept; None: the first.
    """
    model, moe = config.model, config.moe
    router, balance = moe.router, moe.router.balance
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_width,
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "max_position_embeddings": model.sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "layer_frequency": moe.layer_frequency,
        "dense_layers": list(moe.dense_layers),
        "num_experts": moe.num_experts,
        "num_null_experts": moe.num_null_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_hidden_size,
        "shared_expert_intermediate_size": moe.shared_expert_hidden_size,
        "shared_expert_gate": moe.shared_expert_gate,
        "score_function": router.score_function,
        "normalize": router.normalize,
        "shared_null_row": router.null_init == "shared" and moe.num_null_experts > 0,
        "num_identity_experts": moe.null_types.identity,
        "num_constant_experts": moe.null_types.constant,
        "gating_residual": router.gating_residual,
        "target_load": router.target_load,
        "capacity_factor": router.capacity_factor,
        "router_balance": balance.type,
        "router_aux_loss_coef": annealed_coefficient(
            step or 0, balance.coefficient, balance.final_coefficient, balance.anneal_steps or config.total_steps
        ),
        "router_target_null_share": balance.target_null_share,
        "router_z_loss_coef": router.z_loss_coefficient,
    }


def class_tensors(name: str, tensor: Tensor, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the class, by name, that a canonical tensor is made of.

    Args:
        name: canonical, without ``model.``.
        tensor: whole.
        config: of the model.

    Raises:
        UserError: the class has no such tensor.
    """
    if name in _WHOLE:
        yield _WHOLE[name], tensor
        return
    match = _LAYER.fullmatch(name)
    inner = match[2] if match else name
    prefix = f"model.layers.{match[1]}." if match else ""
    if inner in _IN_LAYER:
        yield prefix + _IN_LAYER[inner], tensor
    elif inner in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        kind = inner.rpartition(".")[2]
        for part, value in zip("qkv", split_qkv(tensor, config), strict=True):
            yield f"{prefix}self_attn.{part}_proj.{kind}", value
    elif inner in ("mlp.linear_fc1.weight", "mlp.shared_experts.linear_fc1.weight"):
        module = "mlp" if inner == "mlp.linear_fc1.weight" else "mlp.shared_expert"
        gate, up = tensor.chunk(2)
        yield f"{prefix}{module}.gate_proj.weight", gate
        yield f"{prefix}{module}.up_proj.weight", up
    else:
        raise UserError(f"tensor {name} has no place in the transformers class; export is for models of this version")


def split_qkv(joint: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of a joint projection, whose rows are [queries, key, value] of each group."""
    model = config.model
    groups = model.num_query_groups or model.num_attention_heads
    queries, width = model.num_attention_heads // groups, model.head_width
    by_group = joint.unflatten(0, (groups, queries + 2, width))
    parts = by_group.split([queries, 1, 1], dim=1)
    query, key, value = (part.flatten(0, 2) for part in parts)
    return query, key, value
