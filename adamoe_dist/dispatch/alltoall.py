"""The all-to-all dispatcher that moves rows for true experts only."""

from torch import Tensor

from adamoe_dist.dispatch.base import CountingDispatcher, DispatcherSlot
from adamoe_dist.dispatch.counts import DispatchCount
from adamoe_dist.dispatch.exchange import AllToAll, Meanwhile, exchange, exchange_equally
from adamoe_dist.dispatch.plan import (
    ReceivePlan,
    SendPlan,
    Sizes,
    pack_by_rank,
    packed_sizes,
    plan_receiving,
    plan_sending,
)
from adamoe_dist.dispatch.rows import sum_rows, take_rows


class AllToAllDispatcher(CountingDispatcher):
    """All-to-all dispatch in which a null slot has no row, no byte and no product, forward or backward.

    One exchange of routing bits tells every rank what it will receive; from these bits both sides derive the sizes and
    orders of everything else. With ``deduplicate`` a token travels once to each rank that holds at least one of its
    true experts; the outputs of that rank's experts are summed there and one row comes back. Without, one row travels
    for each (token, true expert).
    """

    _send: SendPlan
    _receive: ReceivePlan
    _sent: Sizes
    _received: Sizes

    def __init__(self, slot: DispatcherSlot, deduplicate: bool) -> None:
        """Make the dispatcher of one MoE layer.

        Args:
            slot: where it sits.
            deduplicate: send a token once to a rank that holds several of its experts.
        """
        super().__init__(slot)
        self.deduplicate = deduplicate

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Plan the exchange and gather this rank's outgoing rows.

        Args:
            hidden_states: (..., H) token vectors, T in all.
            routing_map: (T, E) bool, true experts only.
            probs: (T, E) combine weights.

        Returns:
            The outgoing rows, (R, H) or (P, H), and the outgoing weights, (P,), in send order.
        """
        hidden_TH = self._tokens(hidden_states, routing_map, probs)
        outgoing_GTB = pack_by_rank(routing_map, self.ep_size)
        incoming_GTB = exchange_equally(outgoing_GTB, self.ep_group)
        self._sent, self._received = packed_sizes(outgoing_GTB, incoming_GTB)
        self._send = plan_sending(outgoing_GTB, self.num_local_experts, self._sent)
        self._receive = plan_receiving(incoming_GTB, self.num_local_experts, self._received)
        weights_P = probs.reshape(-1).index_select(0, self._send.pair_weight_P)
        metadata = outgoing_GTB[0].numel() * (self.ep_size - 1)
        self.last_count = self._count(self._row_bytes(hidden_TH), weights_P.element_size(), metadata)
        return take_rows(hidden_TH, self._row_token()), weights_P

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Exchange rows and weights over the expert-parallel group; ``meanwhile`` runs while they travel."""
        weights = AllToAll(self.ep_group, self._sent.pairs_per_rank, self._received.pairs_per_rank)
        rows = AllToAll(self.ep_group, *self._row_splits())
        received = exchange((hidden_states, rows), (probs, weights), dtype=self.row_dtype, meanwhile=meanwhile)
        return received[0], received[1]

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (P, H), tokens_per_expert (L,), weights (P,))`` in expert order."""
        rows = take_rows(hidden_states, self._expert_source())
        weights = probs.index_select(0, self._receive.pair_position_P)
        return rows, self._receive.tokens_per_expert_L, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs (P, H) into the order, and with ``deduplicate`` the sums, that travel back."""
        return sum_rows(hidden_states, self._expert_source(), sum(self._row_splits()[1]))

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Exchange the results back to the ranks of their tokens."""
        sent, received = self._row_splits()
        (returned,) = exchange((hidden_states, AllToAll(self.ep_group, received, sent)), dtype=self.row_dtype)
        return returned

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the results of each token; a token without a true expert gets exactly zero."""
        return self._sum_by_token(hidden_states, self._row_token())

    def _row_token(self) -> Tensor:
        """Token of each outgoing row."""
        return self._send.row_token_R if self.deduplicate else self._send.pair_token_P

    def _row_splits(self) -> tuple[list[int], list[int]]:
        """Rows to and from each rank."""
        if self.deduplicate:
            return self._sent.rows_per_rank, self._received.rows_per_rank
        return self._sent.pairs_per_rank, self._received.pairs_per_rank

    def _expert_source(self) -> Tensor:
        """Received row that each pair, in expert order, reads."""
        return self._receive.pair_row_P if self.deduplicate else self._receive.pair_position_P

    def _count(self, row_bytes: int, weight_bytes: int, metadata: int) -> DispatchCount:
        rows_per_rank = self._row_splits()[0]
        remote_rows = self.placement.remote(rows_per_rank)
        remote_pairs = self.placement.remote(self._sent.pairs_per_rank)
        return DispatchCount(
            *self.placement.by_distance(rows_per_rank),
            rows_undeduplicated=remote_pairs,
            bytes=remote_rows * row_bytes + remote_pairs * weight_bytes + metadata,
        )
