"""Norm and attention kernels of the model, on CPU and CUDA without Transformer Engine."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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


class CausalAttention(torch.nn.Module):
    """Causal scaled dot-product attention: flash kernels on CUDA, no score matrix on CPU."""

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
            query: (sequence, batch, heads, width).
            key: (sequence, batch, groups, width).
            value: (sequence, batch, groups, width).
            attention_mask: must be None: the causal mask is implied.
            attn_mask_type: must be causal or None.

        Returns:
            (sequence, batch, heads * width).
        """
        assert attention_mask is None and attn_mask_type in (None, AttnMaskType.causal), attn_mask_type
        length, batch = query.shape[:2]
        output = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).reshape(length, batch, -1)
