"""Which part of each whole weight a rank holds, whatever the layout.

A weight's *canonical* name is the one it has in a model that is not cut: layers are numbered over all pipeline stages.
Its whole shape is the one it has there: experts of a layer stacked by global number, matrices not cut.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

MODULE_PREFIX = "gpt."
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Cut:
    """How one axis is cut over a group of ranks.

    ``sections`` is the number of matrices that are stacked along the axis, each of which is cut by itself: 2 for the
    gate and up projections of SwiGLU.
    """

    axis: int
    rank: int
    ranks: int
    sections: int = 1


@dataclass(frozen=True)
class Piece:
    """One block of a weight: its place in the local tensor and in the whole one."""

    local: tuple[slice, ...]
    whole: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """The part of one whole weight that this rank holds.

    Attributes:
        name: canonical.
        parameter: the local tensor.
        shape: of the whole weight.
        pieces: the blocks of which the local tensor consists.
        replica: this rank's place among the ranks that hold the same part.
        replicas: how many they are.
    """

    name: str
    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: int
    replicas: int

    def cut(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor."""
        assert tuple(whole.shape) == self.shape, (self.name, whole.shape, self.shape)
        local = whole.new_empty(self.parameter_shape)
        for piece in self.pieces:
            local[piece.local] = whole[piece.whole]
        return local

    def place(self, local: Tensor, whole: Tensor) -> None:
        """Write this rank's part into a whole tensor."""
        for piece in self.pieces:
            whole[piece.whole] = local[piece.local]

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor (ZeRO-3 leaves the parameter itself empty)."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))


def forget_logged_losses() -> None:
    """Clear what Megatron's own router logs for the whole process: its length is that of the first model's layers."""
    try:
        logging = importlib.import_module("megatron.core.transformer.moe.moe_logging")
    except ModuleNotFoundError:  # before 0.17
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    else:
        logging.destroy_moe_metrics_tracker()


def is_tied_copy(parameter: Tensor) -> bool:
    """Tell whether a weight is the last stage's copy of the embedding, which the first stage trains."""
    return bool(getattr(parameter, "is_tied_copy", False))


def parts_of(model: torch.nn.Module) -> dict[str, Part]:
    """Return this rank's part of each weight, frozen or not, by canonical name; copies of the embedding left out."""
    return {name: part_of(name, p) for name, p in local_names(model) if not is_tied_copy(p)}


def local_names(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield this rank's weights with their canonical names."""
    offset = _layer_offset(model)
    for local_name, parameter in model.named_parameters():
        yield canonical_name(local_name, offset), parameter


def canonical_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of a model by canonical name.

    They are fp32 and the same on all ranks of a pipeline stage.
    """
    offset = _layer_offset(model)
    buffers = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] in module._non_persistent_buffers_set:
                continue
            assert buffer.dtype == torch.float32, (
                f"buffer {name} is {buffer.dtype}: a checkpoint would not keep its bits"
            )
            buffers[canonical_name(name, offset)] = buffer
    return buffers


def canonical_name(local_name: str, layer_offset: int) -> str:
    """Return the canonical name of a weight or buffer of :class:`LanguageModel`."""
    name = local_name.removeprefix(MODULE_PREFIX)
    return _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + layer_offset}.", name)


def _layer_offset(model: torch.nn.Module) -> int:
    """Layers on earlier pipeline stages."""
    return min((m.layer_number for m in model.modules() if isinstance(m, TransformerLayer)), default=1) - 1


def part_of(name: str, parameter: torch.nn.Parameter) -> Part:
    """Return this rank's part of the whole weight ``name``, which ``parameter`` holds."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    cuts = _expert_cuts(parameter) if getattr(parameter, "is_expert", False) else _dense_cuts(parameter)
    cuts = [cut for cut in cuts if cut.ranks > 1]
    whole = tuple(size * prod(cut.ranks for cut in cuts if cut.axis == axis) for axis, size in enumerate(shape))
    return Part(name, parameter, whole, _pieces(shape, cuts), *replica_of(parameter))


def reduction_group(parameter: Tensor) -> dist.ProcessGroup:
    """Return the ranks that hold the same part of a weight, but for tensor-parallel copies."""
    if getattr(parameter, "is_expert", False):
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def replica_of(parameter: Tensor) -> tuple[int, int]:
    """Return this rank's place among the ranks that hold the same part of a weight, and how many they are.

    A weight without ``tensor_model_parallel`` is the same on all tensor-parallel ranks. Expert-tensor ranks hold
    different parts of an expert, so the ranks that reduce it are all that hold it.
    """
    group = reduction_group(parameter)
    replica, replicas = dist.get_rank(group), dist.get_world_size(group)
    if getattr(parameter, "tensor_model_parallel", False):
        return replica, replicas
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return replica * tensor + parallel_state.get_tensor_model_parallel_rank(), replicas * tensor


def _dense_cuts(parameter: torch.nn.Parameter) -> list[Cut]:
    """Megatron's marks of a tensor-parallel weight."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return []
    rank, ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    return [Cut(parameter.partition_dim, rank, ranks, parameter.partition_stride)]  # type: ignore[attr-defined]


def _expert_cuts(parameter: torch.nn.Parameter) -> list[Cut]:
    """Experts are cut by number, and each over the expert-tensor ranks (gate and up each by itself)."""
    cuts = [
        Cut(
            0,
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
    ]
    axis = getattr(parameter, "expert_tensor_axis", None)
    if axis is not None:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        cuts.append(Cut(axis, rank, ranks, sections=2 if axis == 1 else 1))
    return cuts


def _pieces(shape: tuple[int, ...], cuts: list[Cut]) -> tuple[Piece, ...]:
    """Return the blocks of a local tensor: one, or one for each section that is cut by itself."""
    by_axis: list[list[tuple[slice, slice]]] = [[(slice(0, size), slice(0, size))] for size in shape]
    for cut in cuts:
        size = shape[cut.axis] // cut.sections
        places = []
        for section in range(cut.sections):
            start = (section * cut.ranks + cut.rank) * size
            places.append((slice(section * size, (section + 1) * size), slice(start, start + size)))
        by_axis[cut.axis] = places
    return tuple(
        Piece(tuple(local for local, _ in choice), tuple(whole for _, whole in choice)) for choice in product(*by_axis)
    )
