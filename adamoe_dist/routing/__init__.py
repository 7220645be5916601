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
from adamoe_dist.routing.selection import Normalize, Selection, select
from adamoe_dist.routing.statistics import RoutingStatistics, routing_statistics
from adamoe_dist.routing.target_load import Score, decayed_rate, score_gain, updated_bias

__all__ = [
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
    "decayed_rate",
    "expand_shared",
    "initial_null_rows",
    "mean_probabilities",
    "read_vector",
    "routing_statistics",
    "score_gain",
    "select",
    "updated_bias",
    "z_loss",
]
