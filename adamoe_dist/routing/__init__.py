"""Which experts a token uses: selection, balance losses, statistics and initialisation of the null rows."""

from adamoe_dist.routing.losses import (
    BalanceKind,
    annealed_coefficient,
    balance_loss,
    balanced_loads,
    mean_probabilities,
    z_loss,
)
from adamoe_dist.routing.selection import Normalize, Selection, select
from adamoe_dist.routing.statistics import RoutingStatistics, routing_statistics

__all__ = [
    "BalanceKind",
    "Normalize",
    "RoutingStatistics",
    "Selection",
    "annealed_coefficient",
    "balance_loss",
    "balanced_loads",
    "mean_probabilities",
    "routing_statistics",
    "select",
    "z_loss",
]
