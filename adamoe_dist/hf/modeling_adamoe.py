"""AdaMoE language models for transformers: generation, fine-tuning and evaluation of exported weights.

This file is saved beside exported weights, so it imports nothing but torch, transformers and its neighbours.

Axes: B batch, S sequence, T = B S tokens, H hidden, F inner width, E true experts (n), N null experts (m), A = E + N,
W null experts that have an output, K slots, D width of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_adamoe import AdaMoEConfig
from .layers_adamoe import (
    AdaMoEAttention,
    AdaMoEBlock,
    AdaMoEExperts,
    AdaMoEMLP,
    AdaMoENullExperts,
    AdaMoERMSNorm,
    AdaMoERouter,
)
from .routing_adamoe import balance_loss, z_loss

IGNORED = -100


@dataclass
class AdaMoEModelOutput(MoeModelOutputWithPast):
    """Output of the layers.

    Attributes:
        router_loss: the routers' losses with their coefficients, where router logits were asked for.
    """

    router_loss: Tensor | None = None


class AdaMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and a feed-forward layer, dense or of experts."""

    def __init__(self, config: AdaMoEConfig, layer_idx: int, is_first: bool) -> None:
        super().__init__()
        self.self_attn = AdaMoEAttention(config, layer_idx)
        self.has_experts = config.has_experts(layer_idx)
        self.mlp = (
            AdaMoEBlock(config, is_first) if self.has_experts else AdaMoEMLP(config.hidden_size, config.dense_width)
        )
        self.input_layernorm = AdaMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = AdaMoERMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BSH: Tensor, previous_TA: Tensor | None, real_T: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (B, S, H), and of a layer with experts the router's logits and what was selected, each (T, A)."""
        hidden_BSH = hidden_BSH + self.self_attn(self.input_layernorm(hidden_BSH), **kwargs)[0]
        normed_BSH = self.post_attention_layernorm(hidden_BSH)
        if not self.has_experts:
            return hidden_BSH + self.mlp(normed_BSH), None, None
        output_BSH, logits_TA, selected_TA = self.mlp(normed_BSH, previous_TA, real_T)
        return hidden_BSH + output_BSH, logits_TA, selected_TA


class AdaMoEPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes."""

    config: AdaMoEConfig
    config_class = AdaMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("AdaMoEDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("expert_bias",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": AdaMoEDecoderLayer, "attentions": AdaMoEAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the weights of a new module as training does."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, AdaMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std / (2.0 * self.config.num_hidden_layers) ** 0.5)
        elif isinstance(module, AdaMoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.null_weight is not None:
                init.normal_(module.null_weight, mean=0.0, std=std)
            if module.gating_residual_weight is not None:
                init.zeros_(module.gating_residual_weight)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)
        elif isinstance(module, AdaMoENullExperts) and module.constant is not None:
            init.normal_(module.mixture_weight, mean=0.0, std=std)
            init.zeros_(module.constant)


class AdaMoEModel(AdaMoEPreTrainedModel):
    """Embedding, layers and last norm."""

    def __init__(self, config: AdaMoEConfig) -> None:
        """Make a model with new weights."""
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        numbers = range(config.num_hidden_layers)
        first = next((number for number in numbers if config.has_experts(number)), None)
        self.layers = nn.ModuleList([AdaMoEDecoderLayer(config, number, number == first) for number in numbers])
        self.norm = AdaMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> AdaMoEModelOutput:
        """Return the hidden states (B, S, H) after the last norm.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, past + S), 0 at padding, which is attended by none and goes to no expert.
            position_ids: (B, S); None: counted from the length of the cache.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: (B, S, H) instead of input_ids.
            use_cache: return keys and values.
            output_router_logits: return the routers' logits and losses.
            **kwargs: for the attention implementation.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and only one of them")
        hidden_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_BSH.shape[1], device=hidden_BSH.device) + seen).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BSH,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        shared = {
            "position_embeddings": self._rotary(position_ids, hidden_BSH.dtype),
            "attention_mask": causal_mask,
            "past_key_values": past_key_values,
            **kwargs,
        }
        real_T = _real_tokens(attention_mask, hidden_BSH)
        logits, losses, previous_TA = [], [], None
        for layer in self.layers:
            hidden_BSH, logits_TA, selected_TA = layer(hidden_BSH, previous_TA, real_T, **shared)
            if logits_TA is None:
                continue
            previous_TA = logits_TA if self.config.gating_residual else None
            if output_router_logits:
                logits.append(logits_TA)
                losses.append(self._router_loss(logits_TA, selected_TA, real_T))
        return AdaMoEModelOutput(
            last_hidden_state=self.norm(hidden_BSH),
            past_key_values=past_key_values,
            router_logits=tuple(logits) if output_router_logits else None,
            router_loss=torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None,
        )

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, 1, S, D), the angles of the first half of a head repeated for the second."""
        width = self.config.head_width
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
        frequencies = (1.0 / self.config.rotary_base**exponents).to(wide)
        angles = (position_ids.unsqueeze(-1).to(wide) * frequencies).repeat(1, 1, 2).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _router_loss(self, logits_TA: Tensor, selected_TA: Tensor, real_T: Tensor | None) -> Tensor:
        """One layer's losses with their coefficients, as training attaches them."""
        config = self.config
        real_T = None if real_T is None else real_T.to(logits_TA.device)
        loss = config.router_z_loss_coef * z_loss(logits_TA, real_T)
        if config.router_balance == "none":
            return loss
        balance = balance_loss(
            logits_TA,
            selected_TA,
            config.num_experts,
            config.router_balance,
            config.score_function,
            config.router_target_null_share,
            real_T,
        )
        return loss + config.router_aux_loss_coef * balance


class AdaMoEForCausalLM(AdaMoEPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: AdaMoEConfig) -> None:
        """Make a model with new weights."""
        super().__init__(config)
        self.model = AdaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits (B, S, V), and the loss where labels are given.

        The loss is the mean cross-entropy of the next tokens. With router logits, each layer's balance and z-losses are
        added, as in training; ``aux_loss`` is their sum with coefficients. Under ``num_items_in_batch`` (the labels
        of all micro-batches of a step) a micro-batch adds its share of both.

        Args:
            input_ids: see :class:`AdaMoEModel`.
            attention_mask: see :class:`AdaMoEModel`.
            position_ids: see :class:`AdaMoEModel`.
            past_key_values: see :class:`AdaMoEModel`.
            inputs_embeds: see :class:`AdaMoEModel`.
            labels: (B, S) token ids, -100 where there is no loss; they are shifted here.
            use_cache: see :class:`AdaMoEModel`.
            output_router_logits: see :class:`AdaMoEModel`.
            logits_to_keep: how many of the last positions to give logits for (0: all), or which.
            **kwargs: for the attention implementation and the loss.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            if outputs.router_loss is not None:
                share = _share_of_batch(labels, kwargs)
                loss = loss + share * outputs.router_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.router_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def _real_tokens(attention_mask: Any, hidden_BSH: Tensor) -> Tensor | None:
    """Return bool (T,), false for padding, of a mask (B, past + S); None where it does not name tokens."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    length = hidden_BSH.shape[1]
    if attention_mask.shape[1] < length:
        return None
    return attention_mask[:, -length:].to(hidden_BSH.device, torch.bool).reshape(-1)


def _share_of_batch(labels: Tensor, keywords: dict[str, Any]) -> Tensor | float:
    """Return this micro-batch's part of the labels that a step's loss is divided by."""
    labels_of_step = keywords.get("num_items_in_batch")
    if labels_of_step is None:
        return 1.0
    shifted = keywords.get("shift_labels")
    return ((labels[:, 1:] if shifted is None else shifted) != IGNORED).sum() / labels_of_step


__all__ = ["AdaMoEForCausalLM", "AdaMoEModel", "AdaMoEPreTrainedModel"]
