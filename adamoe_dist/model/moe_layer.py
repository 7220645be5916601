"""The MoE layer: Megatron-core's own, with this project's router, dispatcher and experts in its slots."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from adamoe_dist.config import MoEConfig
from adamoe_dist.dispatch import CountingDispatcher, DispatchCount, Placement, make_dispatcher, pairs_per_rank
from adamoe_dist.experts import GroupedExperts
from adamoe_dist.model.config import AdaMoETransformerConfig
from adamoe_dist.routing import (
    AdaMoERouter,
    CountedTopKRouter,
    NullExperts,
    RoutingCounters,
    RoutingStatistics,
    expert_capacity,
)
from adamoe_dist.timing import COMBINE, DISPATCH, EXPERTS, ROUTING, SHARED_EXPERT, Ranges


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
        self.ranges = Ranges()
        self.null_experts = _null_experts(config)
        self._null_output: Tensor | None = None
        self._placement = Placement.in_groups(groups, config.expert_nodes)
        if not self.is_baseline:
            self.token_dispatcher = make_dispatcher(
                config.moe.dispatcher,
                self.num_local_experts,
                config,
                groups,
                config.expert_nodes,
                _capacity(config.moe) if config.moe.dispatcher.pad_to_capacity else None,
            )
        self._shared_input: Tensor | None = None
        self._shared_output: Tensor | None = None

    @property
    def overlaps_shared_expert(self) -> bool:
        """Whether the shared expert is computed while rows travel."""
        able = isinstance(self.token_dispatcher, CountingDispatcher) and self.token_dispatcher.overlaps
        return bool(able and self.use_shared_expert and self.config.moe.dispatcher.overlap_shared_expert)

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
            self.config.moe_aux_loss_coeff = coefficient * self.config.moe.top_k * self.config.context_parallel_size

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route as Megatron does, and compute here what null experts return."""
        with self.ranges(ROUTING):
            routed: tuple[Tensor, Tensor] = super().route(hidden_states, padding_mask)
            if self.null_experts is not None:
                tokens_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
                output_TH = self.null_experts(tokens_TH, self.router.take_null_weights())
                self._null_output = output_TH.view(hidden_states.shape)
            return routed

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Plan the dispatch as Megatron does, and count what it sends to other ranks."""
        with self.ranges(DISPATCH):
            planned: tuple[Tensor, Tensor] = super().preprocess(hidden_states, probs, routing_map)
            if self.training and torch.is_grad_enabled():  # once, also where the layer is recomputed
                self._count_dispatch(hidden_states, probs, routing_map)
            return planned

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Compute the shared expert, or leave it for :meth:`dispatch`."""
        if self.overlaps_shared_expert:
            self._shared_input = hidden_states
            return None
        return self._compute_shared(hidden_states) if self.use_shared_expert else None

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send the rows, and compute the shared expert while they travel if it was left for now."""
        with self.ranges(DISPATCH):
            if self._shared_input is None:
                sent: tuple[Tensor, Tensor] = super().dispatch(hidden_states, probs)
                return sent
            return self.token_dispatcher.token_dispatch(hidden_states, probs, meanwhile=self._compute_shared_meanwhile)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Compute the true experts as Megatron does, each of the three parts under its name."""
        with self.ranges(DISPATCH):
            rows_PH, tokens_per_expert, weights_P = self.token_dispatcher.dispatch_postprocess(hidden_states, probs)
        with self.ranges(EXPERTS):
            output_PH, bias = self.experts(rows_PH, tokens_per_expert, weights_P)
        assert bias is None, "experts have no bias"
        with self.ranges(COMBINE):
            return self.token_dispatcher.combine_preprocess(output_PH), None

    def combine(self, output: Tensor) -> Tensor:
        """Send the results back."""
        with self.ranges(COMBINE):
            returned: Tensor = super().combine(output)
            return returned

    def _compute_shared(self, hidden_states: Tensor) -> Tensor | None:
        with self.ranges(SHARED_EXPERT):
            output: Tensor | None = super().shared_experts_compute(hidden_states)
            return output

    def _compute_shared_meanwhile(self) -> None:
        assert self._shared_input is not None, "nothing was left for now"
        self._shared_output = self._compute_shared(self._shared_input)
        self._shared_input = None

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Sum what each token's true experts, the shared expert and its null experts returned."""
        if self._shared_output is not None:
            shared_expert_output, self._shared_output = self._shared_output, None
        with self.ranges(COMBINE):
            combined: Tensor = super().postprocess(output, shared_expert_output)
            if self.null_experts is None:
                return combined
            null_output, self._null_output = self._null_output, None
            assert null_output is not None, "postprocess without route"
            return combined + null_output

    def _count_dispatch(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> None:
        if isinstance(self.token_dispatcher, CountingDispatcher):
            count = self.token_dispatcher.last_count
        else:
            self.counters.add_statistics(_baseline_statistics(routing_map, self.config.moe.top_k))
            row_bytes = hidden_states.shape[-1] * hidden_states.element_size() + probs.element_size()
            count = _baseline_count(routing_map, self._placement, row_bytes)
        self.counters.add_dispatch(
            rows_same_rank=count.rows_same_rank,
            rows_same_node=count.rows_same_node,
            rows_other_node=count.rows_other_node,
            rows_undeduplicated=count.rows_undeduplicated,
            bytes_same_node=count.bytes_same_node,
            bytes_other_node=count.bytes_other_node,
        )


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


def _baseline_count(routing_map_TE: Tensor, placement: Placement, row_bytes: int) -> DispatchCount:
    """Count what Megatron's all-to-all, and its gathering of cut experts' rows, send: a row and a weight a pair."""
    rows_G = pairs_per_rank(routing_map_TE, placement.ranks)
    return DispatchCount.of(placement, rows_G, pairs_G=rows_G, bytes_G=rows_G * row_bytes)


def _capacity(moe: MoEConfig) -> Callable[[int], int]:
    """Return the rule of the rows that each expert gets from a rank with so many tokens."""
    factor = moe.router.capacity_factor
    assert factor is not None, "moe.dispatcher.pad_to_capacity without moe.router.capacity_factor"
    return lambda tokens: expert_capacity(tokens, factor, moe.expected_load, moe.num_experts)


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
