"""The MoE layer: Megatron-core's own, with this project's router, dispatcher and experts in its slots."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from adamoe_dist.dispatch import TrueExpertDispatcher
from adamoe_dist.experts import GroupedExperts
from adamoe_dist.model.config import AdaMoETransformerConfig
from adamoe_dist.routing import AdaMoERouter, CountedTopKRouter, NullExperts, RoutingCounters, RoutingStatistics


class SharedExperts(SharedExpertMLP):
    """Megatron's shared expert on its own parallel linear layers."""

    def __init__(
        self, config: AdaMoETransformerConfig, pg_collection: ProcessGroupCollection, gate: bool, **_: Any
    ) -> None:
        """Make the expert that every token uses; further keywords of Megatron's builders do not apply."""
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config=config, submodules=linear, gate=gate, pg_collection=pg_collection)


class AdaMoELayer(MoELayer):
    """Megatron's MoE layer with null experts.

    With ``moe.router.type=topk`` Megatron's own router and dispatcher keep their slots, and only the experts are this
    project's; what they route and send is counted all the same.
    """

    def __init__(
        self,
        config: AdaMoETransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **version_keywords: Any,
    ) -> None:
        """Make the layer; ``version_keywords`` are those that newer Megatron versions add to the call."""
        groups = pg_collection or get_default_pg_collection()
        counters = RoutingCounters(config.moe.num_experts, config.moe.top_k)
        self.is_baseline = config.moe.router.type == "topk"
        super().__init__(
            config=config,
            submodules=submodules or _submodules(config, counters),
            layer_number=layer_number,
            pg_collection=groups,
            **version_keywords,
        )
        self.counters = counters
        self.null_experts = _null_experts(config)
        self._null_output: Tensor | None = None
        if not self.is_baseline:
            self.token_dispatcher = TrueExpertDispatcher(
                self.num_local_experts, config, groups, config.moe.dispatcher.deduplicate
            )

    def set_layer_number(self, layer_number: int) -> None:
        """Number the layer (from 1) and draw its experts' initial weights, which depend on the number."""
        super().set_layer_number(layer_number)
        if isinstance(self.experts, GroupedExperts):
            self.experts.initialize(self.config.seed, layer_number)

    def set_balance_coefficient(self, coefficient: float) -> None:
        """Set alpha of the balance loss for the steps that follow."""
        if isinstance(self.router, AdaMoERouter):
            self.router.balance_coefficient = coefficient
        elif self.config.moe.router.balance.type != "none":
            self.config.moe_aux_loss_coeff = coefficient * self.config.moe.top_k

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route as Megatron does, and compute here what null experts return."""
        routed: tuple[Tensor, Tensor] = super().route(hidden_states, padding_mask)
        if self.null_experts is not None:
            tokens_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
            output_TH = self.null_experts(tokens_TH, self.router.take_null_weights())
            self._null_output = output_TH.view(hidden_states.shape)
        return routed

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Combine as Megatron does, and add what null experts returned."""
        combined: Tensor = super().postprocess(output, shared_expert_output)
        if self.null_experts is None:
            return combined
        null_output, self._null_output = self._null_output, None
        assert null_output is not None, "postprocess without route"
        return combined + null_output

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Plan the dispatch as Megatron does, and count what it sends to other ranks."""
        planned: tuple[Tensor, Tensor] = super().preprocess(hidden_states, probs, routing_map)
        if self.training and torch.is_grad_enabled():  # once, also where the layer is recomputed
            self._count_dispatch(hidden_states, probs, routing_map)
        return planned

    def _count_dispatch(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> None:
        if isinstance(self.token_dispatcher, TrueExpertDispatcher):
            count = self.token_dispatcher.last_count
            self.counters.add_dispatch(count.rows, count.rows_undeduplicated, count.bytes)
            return
        self.counters.add_statistics(_baseline_statistics(routing_map, self.config.moe.top_k))
        first, last = self.local_expert_indices[0], self.local_expert_indices[-1] + 1
        rows = int(routing_map.sum()) - int(routing_map[:, first:last].sum())
        row_bytes = hidden_states.shape[-1] * hidden_states.element_size() + probs.element_size()
        self.counters.add_dispatch(rows, rows, rows * row_bytes)


def _baseline_statistics(routing_map_TE: Tensor, top_k: int) -> RoutingStatistics:
    """Return the statistics of a router that gives every token exactly k true experts."""
    tokens_by_load_L = torch.zeros(top_k + 1, dtype=torch.int64, device=routing_map_TE.device)
    tokens_by_load_L[top_k] = routing_map_TE.shape[0]
    return RoutingStatistics(tokens_by_load_L, routing_map_TE.sum(dim=0))


def _null_experts(config: AdaMoETransformerConfig) -> NullExperts | None:
    """Return the null experts that have an output, if there are any."""
    types = config.moe.null_types
    if types.identity + types.constant == 0:
        return None
    return NullExperts(
        types.constant, config.hidden_size, config.init_method, config.params_dtype, config.sequence_parallel
    )


def _submodules(config: AdaMoETransformerConfig, counters: RoutingCounters) -> MoESubmodules:
    """Return Megatron's slots, filled. Classes and functions serve both ways in which its versions build a slot."""

    def router(*, config: Any, pg_collection: Any, **version_keywords: Any) -> Any:
        if config.moe.router.type == "topk":
            baseline = CountedTopKRouter(config=config, pg_collection=pg_collection, **version_keywords)
            baseline.counters = counters
            return baseline
        return AdaMoERouter(config, config.moe, pg_collection, counters)

    return MoESubmodules(
        experts=GroupedExperts,
        shared_experts=SharedExperts if config.moe.shared_expert_hidden_size else None,
        router=router,
    )
