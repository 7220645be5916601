"""The Megatron model of a run."""

from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from adamoe_dist.config import Config, Resolved
from adamoe_dist.experts import choose_kernel
from adamoe_dist.model.config import AdaMoETransformerConfig, is_moe_layer, transformer_config
from adamoe_dist.model.modules import CausalAttention, RMSNorm
from adamoe_dist.model.moe_layer import AdaMoELayer
from adamoe_dist.routing import chain_routers


class LanguageModel(torch.nn.Module):
    """Megatron's GPTModel with a plain forward: token windows in, loss of each token out.

    DeepSpeed's engine wraps this module, so that Megatron's version-dependent arguments stay in this room.
    """

    def __init__(self, gpt: GPTModel) -> None:
        super().__init__()
        self.gpt = gpt

    @property
    def moe_layers(self) -> list[AdaMoELayer]:
        """The MoE layers in order."""
        return [module for module in self.gpt.modules() if isinstance(module, AdaMoELayer)]

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of each next token, in nats.

        Args:
            tokens: (B, S + 1) token ids; the first S are read, the last S are predicted.
            padding_mask: (B, S) bool, true where the token read is padding: it is routed nowhere.

        Returns:
            (B, S) fp32.
        """
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses: Tensor = self.gpt(inputs, positions(inputs), None, labels=labels, padding_mask=padding_mask)
        return losses.float()

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the scores (B, S, V) of the token that follows each of ``tokens`` (B, S)."""
        scores: Tensor = self.gpt(tokens, positions(tokens), None)
        return scores.float()


def positions(tokens: Tensor) -> Tensor:
    """Return the position ids (B, S) of tokens (B, S)."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


@dataclass(frozen=True)
class BuiltModel:
    """A model and what was chosen while building it."""

    model: LanguageModel
    experts_kernel: str
    kernel_reason: str


def build_model(
    config: Config,
    resolved: Resolved,
    vocab_size: int,
    dtype: torch.dtype,
    cuda: bool,
    expert_nodes: tuple[int, ...] = (),
) -> BuiltModel:
    """Build the model of a run on the CPU in fp32; the engine moves and casts it.

    Args:
        config: the tree.
        resolved: its arithmetic.
        vocab_size: the tokenizer's vocabulary.
        dtype: the compute dtype.
        cuda: whether it will run on CUDA.
        expert_nodes: the node of each rank of the expert-parallel group, expert-tensor ranks next to each other, for
            the counts; empty: all on one.
    """
    widths = (config.model.hidden_size, config.moe.expert_hidden_size // config.parallel.expert_tensor)
    kernel, reason = choose_kernel(config.moe.experts.kernel, dtype, cuda, widths)
    megatron = transformer_config(config, resolved, dtype, kernel, expert_nodes)
    gpt = GPTModel(
        config=megatron,
        transformer_layer_spec=block_spec(config, megatron),
        vocab_size=config.padded_vocab_size(vocab_size),
        max_sequence_length=config.model.sequence_length,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        parallel_output=True,
    )
    model = LanguageModel(gpt)
    if config.moe.router.gating_residual:
        chain_routers([layer.router for layer in model.moe_layers])
    return BuiltModel(model, kernel, reason)


def block_spec(config: Config, megatron: AdaMoETransformerConfig) -> TransformerBlockSubmodules:
    """Return the layers' specification, one entry a layer."""
    layers = [layer_spec(is_moe_layer(config, layer)) for layer in range(megatron.num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def layer_spec(has_experts: bool) -> ModuleSpec:
    """Return one layer's specification; it serves Megatron-core 0.16 to 0.19."""
    dense = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=AdaMoELayer if has_experts else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )
