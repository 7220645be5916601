"""Holding ``moe.router.target_load``: every router's selection bias, moved after each optimizer step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from adamoe_dist.config import Config
from adamoe_dist.model import LanguageModel
from adamoe_dist.routing import (
    MARGIN_BINS,
    AdaMoERouter,
    RoutingStatistics,
    decayed_rate,
    gain,
    load_slope,
    score_unit,
    updated_bias,
)


class LoadController:
    """Moves the biases of all MoE layers by the step's counts over all ranks, with one collective a step."""

    def __init__(self, config: Config, model: LanguageModel, target_load: float) -> None:
        """Control ``model``; :func:`load_controller` says whether a run has one."""
        self._router_config = config.moe.router
        self._decay_steps = self._router_config.bias_decay_steps or config.total_steps
        self._moe = config.moe
        self._target_load = target_load
        self._layers = model.moe_layers

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the biases after optimizer step ``step`` (from 0), whose counters are complete. Collective.

        Counts are summed as integers, so all ranks, and all ways of cutting a run, compute the same bits.
        """
        routers = [layer.router for layer in self._layers]
        device = routers[0].expert_bias.device
        packed = torch.stack([layer.counters.packed_control(device) for layer in self._layers])
        dist.all_reduce(packed)
        moe = self._moe
        unit = score_unit("softmax", moe.num_experts + moe.num_null_experts)
        rate = decayed_rate(self._router_config.bias_rate, step, self._decay_steps)
        for router, layer_counts in zip(routers, packed, strict=True):
            margins_M, routing = layer_counts.split([MARGIN_BINS, layer_counts.shape[0] - MARGIN_BINS])
            counts = RoutingStatistics.unpacked(routing, moe.num_experts)
            bias_E = updated_bias(
                router.expert_bias,
                counts.expert_counts_E,
                counts.real_tokens,
                self._moe.top_k,
                self._target_load,
                gain(rate, load_slope(margins_M, unit), moe.num_experts, moe.top_k),
            )
            router.expert_bias.copy_(bias_E)


def load_controller(config: Config, model: LanguageModel) -> LoadController | None:
    """Return the controller of a run, or None where ``moe.router.target_load`` is off."""
    target_load = config.moe.router.target_load
    if target_load is None:
        return None
    assert all(isinstance(layer.router, AdaMoERouter) for layer in model.moe_layers)
    return LoadController(config, model, target_load)
