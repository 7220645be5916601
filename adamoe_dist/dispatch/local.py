"""The dispatcher of a rank that holds all experts: rows are gathered and summed, and nothing is sent."""

from torch import Tensor

from adamoe_dist.dispatch.base import CountingDispatcher
from adamoe_dist.dispatch.counts import DispatchCount
from adamoe_dist.dispatch.exchange import Meanwhile
from adamoe_dist.dispatch.plan import LocalPlan, pack_by_rank, packed_sizes, plan_locally
from adamoe_dist.dispatch.rows import take_rows


class LocalDispatcher(CountingDispatcher):
    """Dispatch with one expert-parallel rank; only the pairs that exist have a row in the experts' input."""

    overlaps = False
    _plan: LocalPlan

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Gather the experts' input.

        Args:
            hidden_states: (..., H) token vectors, T in all.
            routing_map: (T, E) bool, true experts only.
            probs: (T, E) combine weights.

        Returns:
            ``(rows (P, H), weights (P,))`` in expert order.
        """
        hidden_TH = self._tokens(hidden_states, routing_map, probs)
        packed_GTB = pack_by_rank(routing_map, num_ranks=1)
        (sizes,) = packed_sizes(packed_GTB)
        self._plan = plan_locally(packed_GTB[0], self.num_local_experts, sizes)
        self.last_count = DispatchCount(rows_same_rank=sizes.rows_per_rank[0])
        weights = probs.reshape(-1).index_select(0, self._plan.pair_weight_P)
        return take_rows(hidden_TH, self._plan.pair_token_P), weights

    def token_dispatch(
        self, hidden_states: Tensor, probs: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what is given: it is where it belongs."""
        assert meanwhile is None, "nothing travels, so nothing can be done meanwhile"
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(input (P, H), tokens_per_expert (L,), weights (P,))`` in expert order."""
        return hidden_states, self._plan.tokens_per_expert_L, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Return what is given."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Return what is given."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the results of each token; a token without a true expert gets exactly zero."""
        return self._sum_by_token(hidden_states, self._plan.pair_token_P)
