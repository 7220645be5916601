"""Low-rank adapters of attention (LoRA, arXiv 2106.09685): W is used as W + alpha/r B A, and W stays.

Legend: r rank, I input width, O output width, of this rank's part where the matrix is cut. An adapter is a submodule
``lora`` of the layer that it belongs to, so canonical names are ``<layer>.lora.a`` and ``<layer>.lora.b``; those of the
experts are in :mod:`adamoe_dist.experts`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.config import LoraConfig
from adamoe_dist.experts import AdaptedExperts, GroupedExperts
from adamoe_dist.model.build import LanguageModel

_MARK = ".lora."


class LinearAdapter(torch.nn.Module):
    """Adds ``scale B A x`` to a linear layer of Megatron's, cut as that is.

    A column-parallel layer gathers its input along the sequence, so ``a`` is whole and works on this rank's part, and
    what is gathered has width r only. A row-parallel one sums over ranks and scatters along the sequence, so ``a`` is
    cut as the layer's columns are, and ``b`` is whole. Whole matrices get their gradients summed as norms do.
    """

    def __init__(self, linear: torch.nn.Module, rank: int, scale: float, generator: torch.Generator) -> None:
        """Make the adapter of ``linear``; ``a`` is drawn whole and cut, ``b`` is 0."""
        super().__init__()
        self.is_column = isinstance(linear, ColumnParallelLinear)
        assert self.is_column or isinstance(linear, RowParallelLinear), type(linear)
        layer: Any = linear
        config, weight = layer.config, layer.weight
        self.is_cut, self.scale = config.sequence_parallel, scale
        outputs, inputs = weight.shape
        parts = 1 if self.is_column else config.tensor_model_parallel_size
        part = layer.tp_group.rank() if parts > 1 else 0
        whole_rI = torch.empty(rank, inputs * parts).uniform_(-1.0, 1.0, generator=generator)
        a_rI = whole_rI.div_((inputs * parts) ** 0.5).chunk(parts, dim=1)[part]
        self.a = torch.nn.Parameter(a_rI.contiguous().to(weight.dtype))
        self.b = torch.nn.Parameter(torch.zeros(outputs, rank, dtype=weight.dtype))
        cut, whole, axis = (self.b, self.a, 0) if self.is_column else (self.a, self.b, 1)
        _mark(cut, tensor_model_parallel=True, partition_dim=axis, partition_stride=1)
        _mark(whole, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output (S, B, O) for its input (S, B, I), each cut as the layer's."""
        inner = F.linear(x, self.a)
        if self.is_cut:
            inner = (
                gather_from_sequence_parallel_region(inner)
                if self.is_column
                else reduce_scatter_to_sequence_parallel_region(inner)
            )
        return F.linear(inner, self.b) * self.scale


def add_adapters(model: LanguageModel, lora: LoraConfig, seed: int) -> None:
    """Put adapters where ``lora.targets`` says; the model's output stays the same.

    Their initial values depend on the seed, the layer's number and, of experts, on each one's, not on the ranks.
    """
    assert lora.rank is not None
    scale = lora.alpha / lora.rank
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        if "attention" in lora.targets:
            for place, name in enumerate(("linear_qkv", "linear_proj")):
                linear = getattr(layer.self_attention, name)
                generator = platform.seeded_generator(seed, layer.layer_number, place)
                linear.lora = LinearAdapter(linear, lora.rank, scale, generator)
                linear.register_forward_hook(_add_adapter)
        experts = getattr(layer.mlp, "experts", None)
        if "experts" in lora.targets and isinstance(experts, GroupedExperts):
            experts.lora = AdaptedExperts(experts, lora.rank, scale, seed, layer.layer_number)


def is_adapter(name: str) -> bool:
    """Tell whether a canonical name is that of an adapter's matrix."""
    return _MARK in name


def _add_adapter(linear: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    adapter: Any = linear.lora
    return output[0] + adapter(inputs[0]), *output[1:]


def _mark(parameter: torch.nn.Parameter, **marks: object) -> None:
    for name, value in marks.items():
        setattr(parameter, name, value)
