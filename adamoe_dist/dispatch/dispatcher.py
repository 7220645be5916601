"""The token dispatcher that moves rows for true experts only, in Megatron-core's dispatcher slot."""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from adamoe_dist.dispatch.exchange import all_to_all, exchange_maps
from adamoe_dist.dispatch.plan import (
    ReceivePlan,
    SendPlan,
    pack_bits,
    plan_receiving,
    plan_sending,
    unpack_bits,
)


@dataclass(frozen=True)
class DispatchCount:
    """What one forward dispatch of one layer sent from this rank to *other* ranks.

    ``rows``: hidden vectors; ``rows_undeduplicated``: hidden vectors that one row per (token, true expert) would have
    been; ``bytes``: of the rows, their combine weights and the routing bits.
    """

    rows: int
    rows_undeduplicated: int
    bytes: int


class TrueExpertDispatcher(MoETokenDispatcher):
    """All-to-all dispatch in which a null slot has no row, no byte and no product, forward or backward.

    One exchange of routing bits tells every rank what it will receive; from these bits both sides derive the sizes and
    orders of everything else. With ``deduplicate`` a token travels once to each rank that holds at least one of its
    true experts; the outputs of that rank's experts are summed there and one row comes back. Without, one row travels
    for each (token, true expert).

    All ranks of the expert-parallel group must dispatch the same number of tokens.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        deduplicate: bool,
    ) -> None:
        """Make the dispatcher of one MoE layer.

        Args:
            num_local_experts: L, true experts of this rank.
            config: Megatron's configuration.
            pg_collection: Megatron's process groups; the expert-parallel one carries the rows.
            deduplicate: send a token once to a rank that holds several of its experts.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        assert self.tp_size == 1, f"expert tensor parallelism {self.tp_size} is not supported by this dispatcher"
        self.num_local_experts = num_local_experts
        self.deduplicate = deduplicate
        self.last_count = DispatchCount(0, 0, 0)
        self._send: SendPlan
        self._receive: ReceivePlan

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Plan the exchange and gather this rank's outgoing rows.

        Args:
            hidden_states: (..., H) token vectors, T in all.
            routing_map: (T, E) bool, true experts only.
            probs: (T, E) combine weights.

        Returns:
            ``(rows, weights)``: with one rank the experts' input itself, (P, H) and (P,) in expert order; with several
            the outgoing rows, (R, H) or (P, H), and the outgoing weights, (P,), in send order.
        """
        assert routing_map.dtype == torch.bool and routing_map.shape == probs.shape, (
            f"routing_map {routing_map.dtype} {tuple(routing_map.shape)} does not fit probs {tuple(probs.shape)}"
        )
        self._hidden_shape = hidden_states.shape
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.ep_size == 1:
            return self._preprocess_alone(hidden_TH, routing_map, probs)
        self._send = plan_sending(routing_map, self.ep_size)
        packed = exchange_maps(pack_bits(self._send.map_GTL), self.ep_group)
        self._receive = plan_receiving(unpack_bits(packed, self.num_local_experts))
        self._tokens_per_expert = self._receive.tokens_per_expert_L
        probs_GTL = probs.reshape(-1, self.ep_size, self.num_local_experts).transpose(0, 1)
        weights_P = probs_GTL.masked_select(self._send.map_GTL)
        rows = hidden_TH.index_select(0, self._row_token())
        self.last_count = self._count(rows, weights_P, packed)
        return rows, weights_P

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange rows and weights over the expert-parallel group."""
        if self.ep_size == 1:
            return hidden_states, probs
        send, receive = self._send, self._receive
        rows = all_to_all(hidden_states, *self._row_splits(), self.ep_group)
        return rows, all_to_all(probs, send.pairs_per_rank, receive.pairs_per_rank, self.ep_group)

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (P, H), tokens_per_expert (L,), weights (P,))`` in expert order."""
        if self.ep_size == 1:
            return hidden_states, self._tokens_per_expert, probs
        receive = self._receive
        rows = hidden_states.index_select(0, self._expert_source())
        return rows, self._tokens_per_expert, probs.index_select(0, receive.pair_position_P)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs (P, H) into the order, and with ``deduplicate`` the sums, that travel back."""
        if self.ep_size == 1:
            return hidden_states
        send_back = hidden_states.new_zeros(sum(self._row_splits()[1]), hidden_states.shape[-1])
        return send_back.index_add(0, self._expert_source(), hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Exchange the results back to the ranks of their tokens."""
        if self.ep_size == 1:
            return hidden_states
        sent, received = self._row_splits()
        return all_to_all(hidden_states, received, sent, self.ep_group)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the results of each token; a token without a true expert gets exactly zero."""
        output = hidden_states.new_zeros(self._hidden_shape.numel() // self._hidden_shape[-1], self._hidden_shape[-1])
        return output.index_add(0, self._row_token(), hidden_states).view(self._hidden_shape)

    def _preprocess_alone(self, hidden_TH: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        map_ET = routing_map.t().contiguous()
        self._tokens_per_expert = map_ET.sum(dim=1)
        self._alone_token_P = map_ET.nonzero()[:, 1]
        return hidden_TH.index_select(0, self._alone_token_P), probs.t().masked_select(map_ET)

    def _row_token(self) -> Tensor:
        """Token of each outgoing row."""
        if self.ep_size == 1:
            return self._alone_token_P
        return self._send.row_token_R if self.deduplicate else self._send.pair_token_P

    def _row_splits(self) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        if self.deduplicate:
            return self._send.rows_per_rank, self._receive.rows_per_rank
        return self._send.pairs_per_rank, self._receive.pairs_per_rank

    def _expert_source(self) -> Tensor:
        """Received row that each pair, in expert order, reads."""
        return self._receive.pair_row_P if self.deduplicate else self._receive.pair_position_P

    def _count(self, rows: Tensor, weights: Tensor, packed: Tensor) -> DispatchCount:
        here = self.ep_rank_in_group
        row_splits = self._row_splits()[0]
        remote_rows = sum(row_splits) - row_splits[here]
        remote_pairs = sum(self._send.pairs_per_rank) - self._send.pairs_per_rank[here]
        metadata = packed[0].numel() * (self.ep_size - 1)
        row_bytes = rows.shape[-1] * rows.element_size()
        return DispatchCount(
            rows=remote_rows,
            rows_undeduplicated=remote_pairs,
            bytes=remote_rows * row_bytes + remote_pairs * weights.element_size() + metadata,
        )

    @property
    def ep_rank_in_group(self) -> int:
        """This rank's place in its expert-parallel group."""
        return torch.distributed.get_rank(self.ep_group)
