"""What all dispatchers have in common: Megatron-core's slot, the placement of the ranks, the count of what is sent."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from adamoe_dist.dispatch.counts import DispatchCount, Placement
from adamoe_dist.dispatch.exchange import Meanwhile
from adamoe_dist.dispatch.rows import sum_rows


@dataclass(frozen=True)
class DispatcherSlot:
    """Where a dispatcher sits: what every kind of it needs to know.

    Attributes:
        num_local_experts: L, true experts of this rank.
        config: Megatron's configuration.
        pg_collection: Megatron's process groups; the expert-parallel one carries the rows.
        nodes: The node of each rank of that group, expert-tensor ranks next to each other; empty: all on one.
        row_dtype: The rows' type on the way; None: as the model computes.
    """

    num_local_experts: int
    config: TransformerConfig
    pg_collection: ProcessGroupCollection
    nodes: Sequence[int] = ()
    row_dtype: torch.dtype | None = None


class CountingDispatcher(MoETokenDispatcher):
    """A dispatcher in which a null slot costs nothing, and which counts what each forward dispatch sends.

    All ranks that share the experts must dispatch the same number of tokens: those of the expert-parallel and of the
    expert-tensor group. Each has tokens of its own, also where they share one sequence.
    """

    overlaps = True
    """Whether :meth:`token_dispatch` can do other work while rows travel."""
    cuts_experts = False
    """Whether an expert may be cut over an expert-tensor group."""

    def __init__(self, slot: DispatcherSlot) -> None:
        """Take a slot of one MoE layer."""
        super().__init__(config=slot.config, pg_collection=slot.pg_collection)
        assert self.tp_size == 1 or self.cuts_experts, (
            f"expert tensor parallelism {self.tp_size} is not supported by {type(self).__name__}"
        )
        self.num_local_experts = slot.num_local_experts
        self.row_dtype = slot.row_dtype
        self.placement = Placement.in_groups(slot.pg_collection, slot.nodes)
        self.last_count = DispatchCount()

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Send rows and combine weights to the ranks of their experts; ``meanwhile`` runs while they travel."""
        raise NotImplementedError

    def _tokens(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> Tensor:
        """Check what is dispatched, keep its shape, and return it as (T, H)."""
        assert routing_map.dtype == torch.bool and routing_map.shape == probs.shape, (
            f"routing_map {routing_map.dtype} {tuple(routing_map.shape)} does not fit probs {tuple(probs.shape)}"
        )
        self.hidden_shape = hidden_states.shape
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        assert hidden_TH.shape[0] == routing_map.shape[0], (
            f"{hidden_TH.shape[0]} tokens do not fit a routing map {tuple(routing_map.shape)}"
        )
        return hidden_TH

    def _row_bytes(self, rows: Tensor) -> int:
        return int(rows.shape[-1]) * (self.row_dtype or rows.dtype).itemsize

    def _sum_by_token(self, rows: Tensor, token_R: Tensor) -> Tensor:
        """Sum rows (R, H) by token into the shape that was dispatched; tokens without a row get exactly zero."""
        return sum_rows(rows, token_R, self.hidden_shape[:-1].numel()).view(self.hidden_shape)
