"""Holding ``moe.router.target_load``: every router's selection bias, moved after each optimizer step."""

import torch
import torch.distributed as dist

from adamoe_dist.config import Config
from adamoe_dist.model import LanguageModel
from adamoe_dist.parallel import stage_group
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
        self._moe = config.moe
        self._total_steps = config.total_steps
        self._target_load = target_load
        self._layers = model.moe_layers

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the biases after optimizer step ``step`` (from 0), whose counters are complete. Collective.

        Counts are summed as integers over the pipeline stage, whose ranks then compute the same bits, however the run
        is cut.
        """
        routers = [layer.router for layer in self._layers]
        device = routers[0].expert_bias.device
        counts = torch.stack([layer.counters.packed_control(device) for layer in self._layers])
        dist.all_reduce(counts, group=stage_group())
        for router, layer_counts in zip(routers, counts, strict=True):
            self._update_layer(router, layer_counts, step)

    def _update_layer(self, layer_router: AdaMoERouter, counts: torch.Tensor, step: int) -> None:
        moe, router, bias_E = self._moe, self._moe.router, layer_router.expert_bias
        assert bias_E is not None
        margins_M, packed = counts.split([MARGIN_BINS, counts.shape[0] - MARGIN_BINS])
        routing = RoutingStatistics.unpacked(packed, moe.num_experts)
        slope = load_slope(margins_M, score_unit(router.score_function, moe.num_experts + moe.num_null_experts))
        rate = decayed_rate(router.bias_rate, step, router.bias_decay_steps or self._total_steps)
        mu = gain(rate, slope, moe.num_experts, moe.top_k)
        bias_E.copy_(
            updated_bias(bias_E, routing.expert_counts_E, routing.real_tokens, moe.top_k, self._target_load, mu)
        )


def load_controller(config: Config, model: LanguageModel) -> LoadController | None:
    """Return the controller of a run, or None where ``moe.router.target_load`` is off."""
    target_load = config.moe.router.target_load
    return None if target_load is None else LoadController(config, model, target_load)
