"""One MoE layer in a layout, on every rank; and the same layer on one process that has everything, rank after rank."""

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tests.distributed.cases import counted, merged
from tests.distributed.layouts import Layout, close_groups, open_groups
from tests.model.layers import config_of, hidden_states

SHARED_WIDTH = 24
NO_LOSSES = {"router": {"z_loss_coefficient": 0.0, "balance": {"type": "none"}, "normalize": "all_selected"}}
"""Auxiliary losses are of all ranks that share a sequence, which one process cannot compute rank after rank; null
scores get their gradient from the weights instead."""


@dataclass(frozen=True)
class Variant:
    """Keys of ``moe``, and whether the shared expert has a gate."""

    moe: dict[str, Any] = field(default_factory=dict)
    gate: bool = False


def layer_in(layout: Layout, variant: Variant, nodes: tuple[int, ...] = ()) -> Any:
    """A layer whose weights are slices of the same full ones in every layout."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from adamoe_dist import platform
    from adamoe_dist.model import AdaMoELayer, transformer_config

    platform.seed_everything(3, deterministic=False)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    is_baseline = variant.moe.get("router", {}).get("type") == "topk"
    moe = merged(variant.moe, {"shared_expert_gate": variant.gate})
    changes = {
        "moe": moe if is_baseline else merged(NO_LOSSES, moe),
        "model": {"init_std": 0.3},
        "parallel": {"expert": layout.expert},
    }
    config, resolved = config_of(changes, layout.expert)
    megatron = transformer_config(config, resolved, torch.float32, "sequential", nodes)
    megatron.tensor_model_parallel_size = layout.tensor
    megatron.sequence_parallel = layout.tensor > 1
    megatron.expert_tensor_parallel_size = layout.expert_tensor
    layer = AdaMoELayer(megatron, layer_number=1)
    layer.set_layer_number(1)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        if layer.use_shared_expert:
            full1 = torch.randn(2 * SHARED_WIDTH, 64, generator=generator) * 0.2
            full2 = torch.randn(64, SHARED_WIDTH, generator=generator) * 0.2
            mine = shared_columns(parallel_state.get_tensor_model_parallel_rank(), layout.tensor)
            layer.shared_experts.linear_fc1.weight.copy_(full1[mine + [SHARED_WIDTH + index for index in mine]])
            layer.shared_experts.linear_fc2.weight.copy_(full2[:, mine])
        if layer.null_experts is not None and layer.null_experts.constant is not None:
            layer.null_experts.constant.copy_(torch.randn(layer.null_experts.constant.shape, generator=generator))
    layer.train()
    return layer


def shared_columns(rank: int, ranks: int) -> list[int]:
    """The inner columns of the shared expert that a tensor-parallel rank holds."""
    width = SHARED_WIDTH // ranks
    return list(range(rank * width, (rank + 1) * width))


def pass_through(layer: Any, rank: int) -> dict[str, torch.Tensor]:
    """Forward and backward of one rank's tokens; parameters' gradients add up in the layer."""
    hidden = hidden_states(rank, sequence=12).requires_grad_()
    output = layer(hidden)[0]
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(60 + rank)))
    return {"output": output.detach(), "input": hidden.grad}


def gradients(layer: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), "a missing gradient stalls ZeRO's reduction"
    return found


class Sent:
    """What really leaves this rank in the dispatchers' collectives, by kind: entries and bytes."""

    def __init__(self) -> None:
        self.entries = {"rows": 0, "weights": 0, "bits": 0}
        self.bytes = dict(self.entries)

    def __enter__(self) -> "Sent":
        import torch.distributed as dist

        all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_into_tensor

        def exchanged(
            output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **keywords: Any
        ) -> Any:
            group, sizes = keywords["group"], input_split_sizes
            sizes = [input.shape[0] // group.size()] * group.size() if sizes is None else list(sizes)
            self._add(input, int(sum(sizes) - sizes[group.rank()]))
            return all_to_all(output, input, output_split_sizes, input_split_sizes, **keywords)

        def gathered(output: Any, input: Any, **keywords: Any) -> Any:
            if input.dtype == torch.uint8:
                self._add(input, input.shape[0] * (keywords["group"].size() - 1))
            return all_gather(output, input, **keywords)

        self.patch = mock.patch.multiple(dist, all_to_all_single=exchanged, all_gather_into_tensor=gathered)
        self.patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.patch.stop()

    def _add(self, source: torch.Tensor, entries: int) -> None:
        kind = "bits" if source.dtype == torch.uint8 else "rows" if source.ndim == 2 else "weights"
        self.entries[kind] += entries
        self.bytes[kind] += entries * (source[0].numel() if source.shape[0] else 0) * source.element_size()


def run_variants(layout: Layout, variants: dict[str, Variant], nodes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Every variant of the layer in a layout, on this rank."""
    open_groups(layout)
    try:
        return {name: run_variant(layout, variant, nodes) for name, variant in variants.items()}
    finally:
        close_groups()


def run_variant(layout: Layout, variant: Variant, nodes: tuple[int, ...]) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    layer = layer_in(layout, variant, nodes)
    maps, rows = [], []
    layer.router.register_forward_hook(lambda _, __, outputs: maps.append(outputs[1].clone()))
    layer.experts.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    with Sent() as sent:
        result: dict[str, Any] = pass_through(layer, rank)
    return {
        **result,
        "gradients": gradients(layer),
        "map": maps[0],
        "expert_rows": rows[0],
        "sums": counted(layer)[0],
        "entries": sent.entries,
        "bytes": sent.bytes,
        "overlaps": layer.overlaps_shared_expert,
        "summed_over_tensor": sorted(n for n, p in layer.named_parameters() if getattr(p, "sequence_parallel", False)),
    }


def run_alone(variants: dict[str, Variant], ranks: int) -> dict[str, dict[str, Any]]:
    """Every variant on one process, over the tokens of all ranks one after another."""
    open_groups(Layout())
    try:
        results = {}
        for name, variant in variants.items():
            layer = layer_in(Layout(), variant)
            passes = [pass_through(layer, rank) for rank in range(ranks)]
            results[name] = {"passes": passes, "gradients": gradients(layer)}
        return results
    finally:
        close_groups()
