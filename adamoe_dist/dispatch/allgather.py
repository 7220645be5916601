"""The all-gather dispatcher: every rank sees every token and computes what its own experts add to it."""

from torch import Tensor

from adamoe_dist.dispatch.base import CountingDispatcher
from adamoe_dist.dispatch.counts import DispatchCount, pairs_per_rank
from adamoe_dist.dispatch.exchange import AllGather, Meanwhile, ReduceScatter, exchange, gather
from adamoe_dist.dispatch.plan import LocalPlan, pack_by_rank, packed_sizes, plan_locally
from adamoe_dist.dispatch.rows import sum_rows, take_rows


class AllGatherDispatcher(CountingDispatcher):
    """Gather all tokens on all ranks, and return the sums by reduce-scatter.

    What travels does not depend on the routing: a null slot saves compute, but no row. It is for groups so small, or
    loads so high, that nearly every rank needs nearly every token; the collectives are then the cheapest there are.
    """

    _plan: LocalPlan

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the routing bits and plan this rank's part.

        Args:
            hidden_states: (..., H) token vectors, T in all.
            routing_map: (T, E) bool, true experts only.
            probs: (T, E) combine weights.

        Returns:
            ``(tokens (T, H), weights (T, E))``: what every rank sends to every other.
        """
        hidden_TH = self._tokens(hidden_states, routing_map, probs)
        mine_GTB = pack_by_rank(routing_map, self.ep_size)
        everyone_SGB = gather(mine_GTB.transpose(0, 1), self.ep_group)
        packed_SB = everyone_SGB[:, self.placement.here].contiguous()
        (sizes,) = packed_sizes(packed_SB.unsqueeze(0))
        self._plan = plan_locally(packed_SB, self.num_local_experts, sizes)
        tokens = hidden_TH.shape[0]
        token_bytes = self._row_bytes(hidden_TH) + routing_map.shape[1] * probs.element_size()
        self.last_count = DispatchCount.of(
            self.placement,
            rows_G=[tokens] * self.ep_size,
            pairs_G=pairs_per_rank(routing_map, self.ep_size),
            bytes_G=[tokens * token_bytes + mine_GTB.numel()] * self.ep_size,
        )
        return hidden_TH, probs

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gather tokens and weights of all ranks; ``meanwhile`` runs while they travel."""
        everyone = AllGather(self.ep_group)
        hidden_SH, probs_SE = exchange((hidden_states, everyone), (probs, everyone), meanwhile=meanwhile)
        return hidden_SH, probs_SE

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (P, H), tokens_per_expert (L,), weights (P,))`` in expert order."""
        first = self.placement.here * self.num_local_experts
        self._gathered_tokens = hidden_states.shape[0]
        probs_SL = probs[:, first : first + self.num_local_experts]
        weights = probs_SL.reshape(-1).index_select(0, self._plan.pair_weight_P)
        rows = take_rows(hidden_states, self._plan.pair_token_P)
        return rows, self._plan.tokens_per_expert_L, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum what this rank's experts add to each token of all ranks: (G x T, H)."""
        return sum_rows(hidden_states, self._plan.pair_token_P, self._gathered_tokens)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sum over the ranks and return each its own tokens."""
        (own_TH,) = exchange((hidden_states, ReduceScatter(self.ep_group)))
        return own_TH

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Restore the shape that was dispatched."""
        return hidden_states.view(self.hidden_shape)
