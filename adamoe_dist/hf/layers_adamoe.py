"""The parts of an AdaMoE layer: norms, attention, router, experts.

This file is saved beside exported weights, so it imports nothing but torch, transformers and its neighbours.

Axes: B batch, S sequence, T = B S tokens, H hidden, F inner width, E true experts (n), N null experts (m), A = E + N,
W null experts that have an output, R rows of one expert, D width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_adamoe import AdaMoEConfig
from .routing_adamoe import Routes, select


class AdaMoERMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = _at_least_fp32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class AdaMoEMLP(nn.Module):
    """SwiGLU: a dense feed-forward layer or a shared expert."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., H)."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class AdaMoERouter(nn.Module):
    """Scores n true and m null experts and picks k, in fp32."""

    expert_bias: Tensor | None

    def __init__(self, config: AdaMoEConfig, is_first: bool) -> None:
        super().__init__()
        self.config = config
        experts, null = config.num_experts, config.num_null_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        rows = min(null, 1) if config.shared_null_row else null
        self.null_weight = nn.Parameter(torch.empty(rows, config.hidden_size)) if null else None
        has_residual = config.gating_residual and not is_first
        self.gating_residual_weight = (
            nn.Parameter(torch.empty(experts + null, experts + null)) if has_residual else None
        )
        self.register_buffer("expert_bias", None if config.target_load is None else torch.zeros(experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaMoERouter":
        """Move the bias with the module, but keep its type: it decides between near equal scores."""
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None and before.dtype != self.expert_bias.dtype:
            self.expert_bias = before.to(self.expert_bias.device)
        return self

    def forward(self, tokens_TH: Tensor, previous_TA: Tensor | None, real_T: Tensor | None) -> tuple[Tensor, Routes]:
        """Return the logits (T, A) and what follows from them.

        Args:
            tokens_TH: token vectors.
            previous_TA: logits of the MoE layer before, which a gating residual adds.
            real_T: bool, false for padding.
        """
        config = self.config
        logits_TA = self._logits(_at_least_fp32(tokens_TH))
        if self.gating_residual_weight is not None:
            assert previous_TA is not None, "a gating residual needs the logits of the layer before"
            logits_TA = logits_TA + F.linear(previous_TA, self.gating_residual_weight.to(logits_TA.dtype))
        routes = select(
            logits_TA,
            config.num_experts,
            config.num_experts_per_tok,
            config.normalize,
            config.score_function,
            self.expert_bias,
            config.num_identity_experts + config.num_constant_experts,
            real_T,
        )
        return logits_TA, routes

    def _logits(self, wide_TH: Tensor) -> Tensor:
        if self.null_weight is None:
            return F.linear(wide_TH, self.weight.to(wide_TH.dtype))
        logits_TR = F.linear(wide_TH, torch.cat([self.weight, self.null_weight]).to(wide_TH.dtype))
        if not self.config.shared_null_row:
            return logits_TR
        true_TE, shared_T1 = logits_TR.split([self.config.num_experts, 1], dim=1)
        return torch.cat([true_TE, shared_T1.expand(-1, self.config.num_null_experts)], dim=1)


class AdaMoEExperts(nn.Module):
    """The true experts of a layer: gate above up (E, 2F, H), and down (E, H, F)."""

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        experts, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, tokens_TH: Tensor, weights_TE: Tensor, selected_TE: Tensor) -> Tensor:
        """Return the weighted sum (T, H) of each token's true experts; nothing is computed for other slots.

        Args:
            tokens_TH: token vectors.
            weights_TE: combine weights, applied before the down projection as in training.
            selected_TE: bool, which experts a token goes to.
        """
        output_TH = torch.zeros_like(tokens_TH, dtype=torch.promote_types(tokens_TH.dtype, torch.float32))
        rows_per_expert = selected_TE.sum(dim=0).tolist()
        places = selected_TE.t().nonzero()[:, 1].split(rows_per_expert)
        for expert, place_R in enumerate(places):
            if place_R.numel() == 0:
                continue
            rows_RH = tokens_TH.index_select(0, place_R)
            gate, up = F.linear(rows_RH, self.gate_up_proj[expert]).chunk(2, dim=-1)
            inner_RF = F.silu(gate) * up
            inner_RF = (inner_RF * weights_TE[place_R, expert].unsqueeze(1)).to(inner_RF.dtype)
            output_RH = F.linear(inner_RF, self.down_proj[expert])
            output_TH.index_add_(0, place_R, output_RH.to(output_TH.dtype))
        if self.training and not any(rows_per_expert):  # a zero gradient, not none, which some optimizers wait for
            output_TH = output_TH + self.gate_up_proj[:0].sum() + self.down_proj[:0].sum()
        return output_TH.to(tokens_TH.dtype)


class AdaMoENullExperts(nn.Module):
    """Null experts that have an output: identity, then constant ones ``a1 x + a2 v``, [a1, a2] = softmax(W x)."""

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        self.num_identity, constant = config.num_identity_experts, config.num_constant_experts
        self.mixture_weight = nn.Parameter(torch.empty(constant, 2, config.hidden_size)) if constant else None
        self.constant = nn.Parameter(torch.empty(constant, config.hidden_size)) if constant else None

    def forward(self, tokens_TH: Tensor, weights_TW: Tensor) -> Tensor:
        """Return their weighted sum (T, H)."""
        dtype = tokens_TH.dtype
        weights_TI, weights_TC = weights_TW.tensor_split([self.num_identity], dim=1)
        factor_T1 = weights_TI.sum(dim=1, keepdim=True)
        if self.mixture_weight is None or self.constant is None:
            return factor_T1.to(dtype) * tokens_TH
        scores_TM = F.linear(tokens_TH, self.mixture_weight.flatten(0, 1).to(dtype))
        mixture_TC2 = torch.softmax(scores_TM.unflatten(1, (-1, 2)).to(weights_TC.dtype), dim=2)
        weighted_TC2 = weights_TC.unsqueeze(2) * mixture_TC2
        factor_T1 = factor_T1 + weighted_TC2[..., 0].sum(dim=1, keepdim=True)
        return factor_T1.to(dtype) * tokens_TH + weighted_TC2[..., 1].to(dtype) @ self.constant.to(dtype)


class AdaMoEBlock(nn.Module):
    """A mixture-of-experts layer: router, true experts, shared expert, null experts."""

    def __init__(self, config: AdaMoEConfig, is_first: bool) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = AdaMoERouter(config, is_first)
        self.experts = AdaMoEExperts(config)
        has_output = config.num_identity_experts + config.num_constant_experts > 0
        self.null_experts = AdaMoENullExperts(config) if has_output else None
        shared = config.shared_expert_intermediate_size
        self.shared_expert = AdaMoEMLP(config.hidden_size, shared) if shared else None
        has_gate = shared is not None and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if has_gate else None

    def forward(
        self, hidden_BSH: Tensor, previous_TA: Tensor | None, real_T: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output (B, S, H), the router's logits (T, A) and what was selected (T, A)."""
        tokens_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        logits_TA, routes = self.router(tokens_TH, previous_TA, real_T)
        selected_TE = routes.selected_TA[:, : self.num_experts]
        output_TH = self.experts(tokens_TH, routes.weights_TE, selected_TE)
        if self.shared_expert is not None:
            shared_TH = self.shared_expert(tokens_TH)
            if self.shared_expert_gate is not None:
                shared_TH = torch.sigmoid(self.shared_expert_gate(tokens_TH)) * shared_TH
            output_TH = output_TH + shared_TH
        if self.null_experts is not None:
            output_TH = output_TH + self.null_experts(tokens_TH, routes.null_weights_TW)
        return output_TH.view_as(hidden_BSH), logits_TA, routes.selected_TA


class AdaMoEAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: AdaMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, self.head_dim = config.hidden_size, config.head_width
        queries, keys = config.num_attention_heads * self.head_dim, config.key_heads * self.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.key_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            is_whole = config.qk_norm == "all"
            self.q_norm = AdaMoERMSNorm(queries if is_whole else self.head_dim, config.rms_norm_eps)
            self.k_norm = AdaMoERMSNorm(keys if is_whole else self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_BSH: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, S, H) and the attention weights where the implementation gives them."""
        query = self._heads(self.q_proj(hidden_BSH), self.q_norm)
        key = self._heads(self.k_proj(hidden_BSH), self.k_norm)
        value = self._heads(self.v_proj(hidden_BSH), None)
        query, key = _rotate(query, *position_embeddings), _rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_BSH.shape[:-1], -1)), weights

    def _heads(self, projected: Tensor, norm: nn.Module | None) -> Tensor:
        """Return (B, heads, S, D), normalised over all heads before they are parted or over each after."""
        if norm is not None and self.config.qk_norm == "all":
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.config.qk_norm == "head":
            heads = norm(heads)
        return heads.transpose(1, 2)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn (B, heads, S, D): element i of the first half of a head pairs with element i of the second."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


def _eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with a matrix of scores; returns (B, S, heads, D) and the weights (B, heads, S, past + S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(_at_least_fp32(scores), dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
