"""Which experts a token uses: selection, balance losses, statistics and initialisation of the null rows."""

from adamoe_dist.routing.baseline import CountedTopKRouter
from adamoe_dist.routing.counters import SUMS, RoutingCounters, read_vector
from adamoe_dist.routing.initialisation import NullInit, expand_shared, initial_null_rows
from adamoe_dist.routing.losses import (
    BalanceKind,
    annealed_coefficient,
    balance_loss,
    balanced_loads,
    mean_probabilities,
    z_loss,
)
from adamoe_dist.routing.router import AdaMoERouter
from adamoe_dist.routing.selection import Normalize, Selection, biased_scores, select
from adamoe_dist.routing.statistics import RoutingStatistics, routing_statistics
from adamoe_dist.routing.target_load import (
    MARGIN_BINS,
    Score,
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
    "CountedTopKRouter",
    "Normalize",
    "NullInit",
    "RoutingCounters",
    "RoutingStatistics",
    "Score",
    "Selection",
    "annealed_coefficient",
    "balance_loss",
    "balanced_loads",
    "biased_scores",
    "decayed_rate",
    "expand_shared",
    "gain",
    "initial_null_rows",
    "load_slope",
    "margin_counts",
    "margin_edges",
    "margins",
    "mean_probabilities",
    "read_vector",
    "routing_statistics",
    "score_unit",
    "select",
    "updated_bias",
    "z_loss",
]
