"""The dispatcher of fixed shapes: every expert gets the same number of rows from every rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from adamoe_dist.dispatch.base import CountingDispatcher, DispatcherSlot
from adamoe_dist.dispatch.counts import DispatchCount, pairs_per_rank
from adamoe_dist.dispatch.exchange import AllToAll, Meanwhile, exchange
from adamoe_dist.dispatch.rows import sum_rows, take_rows


class PaddedDispatcher(CountingDispatcher):
    """Drop and pad: C rows for each expert from each rank, whatever the routing.

    The first C tokens of an expert, in token order, keep their place in its rows; further ones are dropped, and missing
    ones are zero rows of weight zero whose gradient is zero. All shapes are known beforehand: no exchange of routing
    bits, no size on the host, equal parts. De-duplication does not apply: a place belongs to one expert.
    """

    def __init__(self, slot: DispatcherSlot, capacity: Callable[[int], int]) -> None:
        """Make the dispatcher of one MoE layer.

        Args:
            slot: where it sits.
            capacity: C for a number of tokens T; the same on all ranks.
        """
        super().__init__(slot)
        self.overlaps = self.ep_size > 1
        self.capacity = capacity

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the places of all experts.

        Args:
            hidden_states: (..., H) token vectors, T in all.
            routing_map: (T, E) bool, true experts only.
            probs: (T, E) combine weights.

        Returns:
            ``(rows (E x C, H), weights (E x C,))`` by expert and place.
        """
        hidden_TH = self._tokens(hidden_states, routing_map, probs)
        tokens, experts = routing_map.shape
        capacity = self.capacity(tokens) if tokens else 0
        self._token_X = tokens_of_places(routing_map, capacity)
        empty_X = self._token_X == tokens
        token_X = self._token_X.masked_fill(empty_X, 0)
        expert_X = torch.arange(experts, device=token_X.device).repeat_interleave(capacity, output_size=token_X.numel())
        rows = take_rows(hidden_TH, token_X).masked_fill(empty_X.unsqueeze(1), 0)
        weights = probs.reshape(-1).index_select(0, token_X * experts + expert_X).masked_fill(empty_X, 0)
        self.last_count = self._count(routing_map, capacity, self._row_bytes(rows) + weights.element_size())
        return rows, weights

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Exchange rows and weights in equal parts; ``meanwhile`` runs while they travel."""
        if self.ep_size == 1:
            assert meanwhile is None, "nothing travels, so nothing can be done meanwhile"
            return hidden_states, probs
        equally = AllToAll(self.ep_group)
        received = exchange((hidden_states, equally), (probs, equally), dtype=self.row_dtype, meanwhile=meanwhile)
        return received[0], received[1]

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (L x G x C, H), tokens_per_expert (L,), weights (L x G x C,))`` in expert order."""
        places = hidden_states.shape[0] // self.num_local_experts
        tokens_per_expert_L = torch.full(
            (self.num_local_experts,), places, dtype=torch.int64, device=hidden_states.device
        )
        rows = self._swap(hidden_states, self.ep_size, self.num_local_experts)
        return rows, tokens_per_expert_L, self._swap(probs, self.ep_size, self.num_local_experts)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs back into the order by rank."""
        return self._swap(hidden_states, self.num_local_experts, self.ep_size)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Exchange the results back to the ranks of their tokens."""
        if self.ep_size == 1:
            return hidden_states
        (returned,) = exchange((hidden_states, AllToAll(self.ep_group)), dtype=self.row_dtype)
        return returned

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the results of each token; what comes from empty places is added to a row that is then cut off."""
        tokens = self.hidden_shape[:-1].numel()
        return sum_rows(hidden_states, self._token_X, tokens + 1)[:tokens].view(self.hidden_shape)

    def _swap(self, rows: Tensor, outer: int, inner: int) -> Tensor:
        """Exchange the two leading axes, ranks and local experts, of rows (outer x inner x C, ...)."""
        capacity = rows.shape[0] // (outer * inner)
        return rows.view(outer, inner, capacity, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    def _count(self, routing_map: Tensor, capacity: int, row_bytes: int) -> DispatchCount:
        rows = self.num_local_experts * capacity
        return DispatchCount.of(
            self.placement,
            rows_G=[rows] * self.ep_size,
            pairs_G=pairs_per_rank(routing_map, self.ep_size),
            bytes_G=[rows * row_bytes] * self.ep_size,
        )


def tokens_of_places(routing_map_TE: Tensor, capacity: int) -> Tensor:
    """Return the token in each expert's places (E x C,), T where a place is empty.

    Args:
        routing_map_TE: (T, E) bool.
        capacity: C, places of each expert.
    """
    tokens, experts = routing_map_TE.shape
    place_TE = routing_map_TE.cumsum(dim=0) - 1
    kept_TE = routing_map_TE & (place_TE < capacity)
    first_E = torch.arange(experts, device=place_TE.device) * capacity
    # What is not kept is written to one more place, which is cut off.
    target_TE = torch.where(kept_TE, first_E + place_TE, experts * capacity)
    token_TE = torch.arange(tokens, device=place_TE.device).unsqueeze(1).expand(tokens, experts)
    token_X = torch.full((experts * capacity + 1,), tokens, dtype=torch.int64, device=place_TE.device)
    return token_X.scatter(0, target_TE.flatten(), token_TE.flatten())[:-1]
