"""Which experts a token uses: selection, balance losses, statistics and initialisation of the null rows."""

from adamoe_dist.routing.baseline import CountedTopKRouter
from adamoe_dist.routing.capacity import DropPolicy, expert_capacity, within_capacity
from adamoe_dist.routing.counters import SUMS, RoutingCounters, read_vector
from adamoe_dist.routing.gating_residual import ScoreChain
from adamoe_dist.routing.initialisation import NullInit, expand_shared, initial_null_rows
from adamoe_dist.routing.losses import (
    BalanceKind,
    BatchLoads,
    annealed_coefficient,
    balance_loss,
    balanced_loads,
    mean_probabilities,
    selected_counts,
    z_loss,
)
from adamoe_dist.routing.null_experts import NullExperts, identity_output, null_output
from adamoe_dist.routing.router import AdaMoERouter, chain_routers
from adamoe_dist.routing.selection import (
    Normalize,
    ScoreFunction,
    Selection,
    biased_scores,
    ranked_top_k,
    same_weights,
    select,
)
from adamoe_dist.routing.statistics import RoutingStatistics, nonfinite_tokens, routing_statistics, score_entropy
from adamoe_dist.routing.target_load import (
    MARGIN_BINS,
    decayed_rate,
    gain,
    load_slope,
    margin_counts,
    margin_edges,
    margins,
    score_unit,
    updated_bias,
)

__all__ = [
    "MARGIN_BINS",
    "SUMS",
    "AdaMoERouter",
    "BalanceKind",
    "BatchLoads",
    "CountedTopKRouter",
    "DropPolicy",
    "Normalize",
    "NullExperts",
    "NullInit",
    "RoutingCounters",
    "RoutingStatistics",
    "ScoreChain",
    "ScoreFunction",
    "Selection",
    "annealed_coefficient",
    "balance_loss",
    "balanced_loads",
    "biased_scores",
    "chain_routers",
    "decayed_rate",
    "expand_shared",
    "expert_capacity",
    "gain",
    "identity_output",
    "initial_null_rows",
    "load_slope",
    "margin_counts",
    "margin_edges",
    "margins",
    "mean_probabilities",
    "nonfinite_tokens",
    "null_output",
    "ranked_top_k",
    "read_vector",
    "routing_statistics",
    "same_weights",
    "score_entropy",
    "score_unit",
    "select",
    "selected_counts",
    "updated_bias",
    "within_capacity",
    "z_loss",
]
