"""DeepSeek-MoE written out plainly: a loop over tokens' experts, attention with all scores at hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(tensors: dict[str, Tensor], values: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return the logits (S, V) of tokens (S,), in the type of the tensors."""
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(values["num_hidden_layers"]):
        own = {name.removeprefix(p): t for name, t in tensors.items() if name.startswith(p := f"model.layers.{layer}.")}
        x = x + _attention(_norm(x, own["input_layernorm.weight"], values), own, values)
        y = _norm(x, own["post_attention_layernorm.weight"], values)
        x = x + (_experts(y, own, values) if "mlp.gate.weight" in own else _swiglu(y, own, "mlp."))
    return _norm(x, tensors["model.norm.weight"], values) @ tensors["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor, values: dict[str, Any]) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + values["rms_norm_eps"]).sqrt()


def _attention(x: Tensor, own: dict[str, Tensor], values: dict[str, Any]) -> Tensor:
    heads = values["num_attention_heads"]
    length, width = x.shape[0], x.shape[1] // heads
    q, k, v = ((x @ own[f"self_attn.{name}_proj.weight"].T).view(length, heads, width) for name in "qkv")
    frequencies = values["rope_theta"] ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]

    def turned(y: Tensor) -> Tensor:
        left, right = y.chunk(2, dim=-1)
        return y * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()

    scores = torch.einsum("qhd,khd->hqk", turned(q), turned(k)) / width**0.5
    later = torch.ones(length, length).triu(1).bool()
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), v)
    return mixed.reshape(length, -1) @ own["self_attn.o_proj.weight"].T


def _swiglu(x: Tensor, own: dict[str, Tensor], prefix: str) -> Tensor:
    gate, up, down = (own[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(x: Tensor, own: dict[str, Tensor], values: dict[str, Any]) -> Tensor:
    shares = (x @ own["mlp.gate.weight"].T).softmax(-1)
    out = _swiglu(x, own, "mlp.shared_experts.")
    for token in range(x.shape[0]):
        chosen = shares[token].sort(descending=True).indices[: values["num_experts_per_tok"]]
        total = shares[token, chosen].sum() if values["norm_topk_prob"] else 1.0
        for expert in chosen.tolist():
            out[token] += shares[token, expert] / total * _swiglu(x[token], own, f"mlp.experts.{expert}.")
    return out
