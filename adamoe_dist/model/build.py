"""The Megatron model of a run."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from adamoe_dist.config import Config, Resolved
from adamoe_dist.experts import choose_kernel
from adamoe_dist.model.config import AdaMoETransformerConfig, is_moe_layer, transformer_config
from adamoe_dist.model.modules import CausalAttention, ContextRotary, KeyNorm, QueryNorm, RMSNorm
from adamoe_dist.model.moe_layer import AdaMoELayer
from adamoe_dist.routing import chain_routers


class SeededLayer(TransformerLayer):
    """Megatron's layer with initial weights that depend on the seed and the layer's number only.

    A pipeline stage does not draw what the stages before it draw.
    """

    def __init__(
        self,
        config: AdaMoETransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        **keywords: Any,
    ) -> None:
        """Seed torch's generator and build the layer; ``layer_number`` (from 1) is counted within the stage."""
        number = layer_number + get_transformer_layer_offset(config)
        torch.manual_seed(int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0]))
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **keywords)


class LanguageModel(torch.nn.Module):
    """Megatron's GPTModel, or one pipeline stage of it, with a plain forward.

    Token windows go in, the loss of each token comes out of the last stage. DeepSpeed's engine wraps this module, so
    that Megatron's version-dependent arguments stay in this room.
    """

    def __init__(self, gpt: GPTModel, context_rank: int, context_ranks: int) -> None:
        """Wrap ``gpt``, whose part of each sequence is that of ``context_rank`` of ``context_ranks``."""
        super().__init__()
        self.gpt = gpt
        self.context_rank, self.context_ranks = context_rank, context_ranks

    @property
    def moe_layers(self) -> list[AdaMoELayer]:
        """The MoE layers in order."""
        return [module for module in self.gpt.modules() if isinstance(module, AdaMoELayer)]

    @property
    def is_first_stage(self) -> bool:
        """Whether this stage reads tokens."""
        return bool(self.gpt.pre_process)

    @property
    def is_last_stage(self) -> bool:
        """Whether this stage gives losses."""
        return bool(self.gpt.post_process)

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share each sequence: tensor- and context-parallel ones. They divide every length."""
        return int(self.context_ranks * self.gpt.config.tensor_model_parallel_size)

    def hidden_shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Return the shape of what a stage gives the next one for ``batch`` sequences of ``length`` tokens."""
        return length // self.sequence_ranks, batch, int(self.gpt.config.hidden_size)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of each next token, in nats, or what the next stage takes.

        Args:
            tokens: (B, S + 1) token ids; the first S are read, the last S are predicted.
            padding_mask: (B, S) bool, true where the token read is padding: it is routed nowhere.
            hidden: what the stage before gave; None on the first.

        Returns:
            (B, S / context ranks) fp32: this rank's part of each sequence. On a stage that is not the last: hidden
            states (S / context / tensor ranks, B, H).
        """
        assert (hidden is None) == self.is_first_stage, "every stage but the first takes hidden states"
        inputs, labels = self._own(tokens[:, :-1]), self._own(tokens[:, 1:])
        if padding_mask is not None:
            padding_mask = self._own(padding_mask)
            if not self.is_first_stage:  # Megatron cuts it along the sequence where it embeds, and there only
                ranks = parallel_state.get_tensor_model_parallel_world_size()
                padding_mask = padding_mask.chunk(ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
        if hidden is not None:
            self.gpt.set_input_tensor(hidden)
        output: Tensor = self.gpt(inputs, positions(inputs), None, labels=labels, padding_mask=padding_mask)
        return output.float() if self.is_last_stage else output

    def logits(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the scores (B, S / context ranks, V) of the token that follows each of ``tokens`` (B, S).

        On a stage that is not the last: hidden states.
        """
        if hidden is not None:
            self.gpt.set_input_tensor(hidden)
        inputs = self._own(tokens)
        scores: Tensor = self.gpt(inputs, positions(inputs), None)
        if not self.is_last_stage:
            return scores
        return gather_from_tensor_model_parallel_region(scores).float()

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's part of each sequence (B, S)."""
        return whole.chunk(self.context_ranks, dim=1)[self.context_rank].contiguous()


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
    if cuda:
        model_parallel_cuda_manual_seed(config.run.seed)
    gpt = GPTModel(
        config=megatron,
        transformer_layer_spec=block_spec(config, megatron),
        vocab_size=config.padded_vocab_size(vocab_size),
        max_sequence_length=config.model.sequence_length,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    context_rank, context_ranks = parallel_state.get_context_parallel_rank(), resolved.layout.context
    gpt.rotary_pos_emb = ContextRotary(gpt.rotary_pos_emb, context_rank, context_ranks)
    if config.model.tie_embeddings and gpt.post_process and not gpt.pre_process:
        gpt.output_layer.weight.is_tied_copy = True
    model = LanguageModel(gpt, context_rank, context_ranks)
    if config.moe.router.gating_residual:
        chain_routers([layer.router for layer in model.moe_layers])
    return BuiltModel(model, kernel, reason)


def block_spec(config: Config, megatron: AdaMoETransformerConfig) -> TransformerBlockSubmodules:
    """Return the specification of this pipeline stage's layers, one entry a layer."""
    norms = {"none": (IdentityOp, IdentityOp), "head": (RMSNorm, RMSNorm), "all": (QueryNorm, KeyNorm)}
    query_norm, key_norm = norms[config.model.qk_norm]
    layers = [layer_spec(is_moe_layer(config, layer), query_norm, key_norm) for layer in range(megatron.num_layers)]
    first, number = get_transformer_layer_offset(megatron), get_num_layers_to_build(megatron)
    return TransformerBlockSubmodules(layer_specs=layers[first : first + number], layer_norm=RMSNorm)


def layer_spec(
    has_experts: bool, query_norm: type[torch.nn.Module] = IdentityOp, key_norm: type[torch.nn.Module] = IdentityOp
) -> ModuleSpec:
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
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )
    return ModuleSpec(
        module=SeededLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=AdaMoELayer if has_experts else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )
