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

__all__ = [
    "SUMS",
    "AdaMoERouter",
    "BalanceKind",
    "CountedTopKRouter",
    "Normalize",
    "NullInit",
    "RoutingCounters",
    "RoutingStatistics",
    "Selection",
    "annealed_coefficient",
    "balance_loss",
    "balanced_loads",
    "expand_shared",
    "initial_null_rows",
    "mean_probabilities",
    "read_vector",
    "routing_statistics",
    "select",
    "z_loss",
]
