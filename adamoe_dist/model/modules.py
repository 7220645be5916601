"""Norm and attention kernels of the model, on CPU and CUDA without Transformer Engine."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from adamoe_dist.model.ulysses import heads_for_sequence, sequence_for_heads


class RMSNorm(torch.nn.Module):
    """Root-mean-square normalisation, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        """Make a norm of vectors of ``hidden_size``; further keywords of Megatron's builders do not apply."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., H)."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class JointNorm(torch.nn.Module):
    """RMSNorm of all heads of a token together, in fp32; the heads may be cut over the tensor-parallel ranks.

    The weight has an element for each element of this rank's heads; the mean of squares is over those of all ranks.
    """

    def __init__(self, config: TransformerConfig, heads: int, head_width: int, eps: float) -> None:
        """Make a norm of ``heads`` heads, those of all ranks, of ``head_width`` each."""
        super().__init__()
        self.eps, self.whole_width = eps, heads * head_width
        self.tensor_group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp
        width = self.whole_width // self.tensor_group.size()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise (sequence, batch, this rank's heads, head width)."""
        joint = heads.flatten(2).float()
        if self.tensor_group.size() == 1:
            normed = F.rms_norm(joint, self.weight.shape, self.weight.float(), self.eps)
        else:
            squares = _SummedOverRanks.apply(joint.square().sum(dim=-1, keepdim=True), self.tensor_group)
            normed = joint * torch.rsqrt(squares / self.whole_width + self.eps) * self.weight.float()
        return normed.to(heads.dtype).view_as(heads)


class QueryNorm(JointNorm):
    """:class:`JointNorm` in the slot of Megatron's norm of queries."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        """Make the norm; ``hidden_size`` is the width of a head."""
        super().__init__(config, config.num_attention_heads, hidden_size, eps)


class KeyNorm(JointNorm):
    """:class:`JointNorm` in the slot of Megatron's norm of keys."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        """Make the norm; ``hidden_size`` is the width of a head."""
        super().__init__(config, config.num_query_groups or config.num_attention_heads, hidden_size, eps)


class _SummedOverRanks(torch.autograd.Function):
    """The sum over ranks, each of which uses it for outputs of its own: the gradient is summed over them too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class ContextRotary(torch.nn.Module):
    """Megatron's rotary angles for a context-parallel rank's part of each sequence, a run of neighbouring tokens.

    Megatron's own cut gives each rank two runs, which evens out ring attention; with the heads spread over the ranks
    (:class:`CausalAttention`) there is nothing to even out.
    """

    def __init__(self, rotary: RotaryEmbedding, context_rank: int, context_ranks: int) -> None:
        """Cut the angles of ``rotary``, whose own forward would keep it, and its groups, in a cache of the process."""
        super().__init__()
        self._rotary = rotary
        self._rank, self._ranks = context_rank, context_ranks
        self._angles: Tensor | None = None
        self.get_rotary_seq_len = rotary.get_rotary_seq_len

    def forward(self, max_seq_len: int, **_: object) -> Tensor:
        """Return the angles (S / context ranks, 1, 1, head width) of this rank's part of ``max_seq_len`` tokens."""
        if self._angles is None or self._angles.shape[0] != max_seq_len:
            self._angles = self._rotary.get_emb(max_seq_len)
        return self._angles.chunk(self._ranks)[self._rank]


class CausalAttention(torch.nn.Module):
    """Causal scaled dot-product attention: flash kernels on CUDA, no score matrix on CPU.

    With context parallelism an all-to-all gives each rank the whole sequence of some of the heads, and another one
    brings the result back (DeepSpeed-Ulysses, arXiv 2309.14509): per layer each rank sends (queries + keys + values +
    outputs) / context ranks, whatever the number of ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        """Make the core attention of one layer; the arguments are those that Megatron's builders give."""
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self", (attn_mask_type, attention_type)
        self.softmax_scale = softmax_scale
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.context_group = groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **_: object,
    ) -> Tensor:
        """Attend.

        Args:
            query: (sequence, batch, heads, width), of this rank's part of the sequence.
            key: (sequence, batch, groups, width).
            value: (sequence, batch, groups, width).
            attention_mask: must be None: the causal mask is implied.
            attn_mask_type: must be causal or None.

        Returns:
            (sequence, batch, heads * width).
        """
        assert attention_mask is None and attn_mask_type in (None, AttnMaskType.causal), attn_mask_type
        if self.context_group.size() == 1:
            return self._attend(query, key, value).flatten(2)
        whole = heads_for_sequence([query, key, value], self.context_group)
        return sequence_for_heads(self._attend(*whole), self.context_group).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (sequence, batch, heads, width) of whole sequences."""
        output = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3)
