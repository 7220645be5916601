"""Norm and attention kernels of the model, on CPU and CUDA without Transformer Engine."""

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
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
