"""The all-to-all dispatcher that moves rows for true experts only."""

from torch import Tensor

from adamoe_dist.dispatch.base import CountingDispatcher, DispatcherSlot
from adamoe_dist.dispatch.counts import DispatchCount
from adamoe_dist.dispatch.exchange import AllToAll, Meanwhile, exchange, exchange_equally
from adamoe_dist.dispatch.expert_tensor import GatherParts, SumParts, gather_bits
from adamoe_dist.dispatch.plan import (
    ReceivePlan,
    SendPlan,
    Sizes,
    joined,
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

    Where each expert is cut over an expert-tensor group of X ranks, what a rank receives it copies to the rest of that
    group, and of each row's X partial results the sum travels back. So a row crosses to another expert-parallel rank
    once, however its experts are cut.
    """

    cuts_experts = True
    _send: SendPlan
    _receive: ReceivePlan
    _sent: Sizes
    _received: Sizes
    _received_by_others: list[Sizes]
    """What the other expert-tensor ranks receive, by rank."""

    def __init__(self, slot: DispatcherSlot, deduplicate: bool) -> None:
        """Make the dispatcher of one MoE layer.

        Args:
            slot: where it sits.
            deduplicate: send a token once to a rank that holds several of its experts.
        """
        super().__init__(slot)
        assert self.ep_size > 1 or self.tp_size > 1, "nothing travels: this is for LocalDispatcher"
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
        incoming_GTB = exchange_equally(outgoing_GTB, self.ep_group) if self.ep_size > 1 else outgoing_GTB
        computed_XGTB = gather_bits(incoming_GTB, self.tp_group)
        self._sent, self._received, *self._received_by_others = packed_sizes(outgoing_GTB, *computed_XGTB.unbind(0))
        self._send = plan_sending(outgoing_GTB, self.num_local_experts, self._sent)
        computed = joined(self._received, *self._received_by_others)
        self._receive = plan_receiving(computed_XGTB.flatten(0, 1), self.num_local_experts, computed)
        weights_P = probs.reshape(-1).index_select(0, self._send.pair_weight_P)
        self.last_count = self._count(
            self._row_bytes(hidden_TH), weights_P.element_size(), metadata=outgoing_GTB[0].numel()
        )
        return take_rows(hidden_TH, self._row_token()), weights_P

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Exchange rows and weights with the ranks of their experts; ``meanwhile`` runs while they travel."""
        rows, weights = hidden_states, probs
        if self.ep_size > 1:
            by_pair = AllToAll(self.ep_group, self._sent.pairs_per_rank, self._received.pairs_per_rank)
            by_row = AllToAll(self.ep_group, *self._row_splits())
            rows, weights = exchange((rows, by_row), (weights, by_pair), dtype=self.row_dtype, meanwhile=meanwhile)
            meanwhile = None
        if self.tp_size > 1:
            pairs = [sum(sizes.pairs_per_rank) for sizes in self._received_by_others]
            for_all = GatherParts(self.tp_group, sum(self._received.pairs_per_rank), pairs)
            rows_for_all = GatherParts(self.tp_group, *self._row_parts())
            rows, weights = exchange(
                (rows, rows_for_all), (weights, for_all), dtype=self.row_dtype, meanwhile=meanwhile
            )
        return rows, weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (P, H), tokens_per_expert (L,), weights (P,))`` in expert order."""
        rows = take_rows(hidden_states, self._expert_source())
        weights = probs.index_select(0, self._receive.pair_position_P)
        return rows, self._receive.tokens_per_expert_L, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs (P, H) into the order, and with ``deduplicate`` the sums, that travel back."""
        mine, others = self._row_parts()
        return sum_rows(hidden_states, self._expert_source(), mine + sum(others))

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sum what the expert-tensor ranks computed, and exchange the results back to the ranks of their tokens."""
        rows = hidden_states
        if self.tp_size > 1:
            (rows,) = exchange((rows, SumParts(self.tp_group, *self._row_parts())), dtype=self.row_dtype)
        if self.ep_size > 1:
            sent, received = self._row_splits()
            (rows,) = exchange((rows, AllToAll(self.ep_group, received, sent)), dtype=self.row_dtype)
        return rows

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the results of each token; a token without a true expert gets exactly zero."""
        return self._sum_by_token(hidden_states, self._row_token())

    def _row_token(self) -> Tensor:
        """Token of each outgoing row."""
        return self._send.row_token_R if self.deduplicate else self._send.pair_token_P

    def _rows(self, sizes: Sizes) -> list[int]:
        """Rows by rank."""
        return sizes.rows_per_rank if self.deduplicate else sizes.pairs_per_rank

    def _row_splits(self) -> tuple[list[int], list[int]]:
        """Rows to and from each expert-parallel rank."""
        return self._rows(self._sent), self._rows(self._received)

    def _row_parts(self) -> tuple[int, list[int]]:
        """Rows that this rank receives, and that each other expert-tensor rank does."""
        return sum(self._rows(self._received)), [sum(self._rows(sizes)) for sizes in self._received_by_others]

    def _expert_source(self) -> Tensor:
        """Row that each pair, in expert order, reads."""
        return self._receive.pair_row_P if self.deduplicate else self._receive.pair_position_P

    def _count(self, row_bytes: int, weight_bytes: int, metadata: int) -> DispatchCount:
        """Count what is sent; ``metadata`` is the bytes of routing bits to each rank, copied as rows are."""
        rows_G, pairs_G = self._rows(self._sent), self._sent.pairs_per_rank
        bytes_G = [
            rows * row_bytes + pairs * weight_bytes + metadata for rows, pairs in zip(rows_G, pairs_G, strict=True)
        ]
        return DispatchCount.of(self.placement, rows_G, pairs_G, bytes_G)
