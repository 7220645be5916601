"""Memory, parameters and compute of a run before it is started."""

from adamoe_dist.planning.arithmetic import describe_run, flops_per_token
from adamoe_dist.planning.memory import RankMemory, rank_memory
from adamoe_dist.planning.parameters import (
    Parameters,
    RankParameters,
    count_parameters,
    expected_load,
    rank_parameters,
)

__all__ = [
    "Parameters",
    "RankMemory",
    "RankParameters",
    "count_parameters",
    "describe_run",
    "expected_load",
    "flops_per_token",
    "rank_memory",
    "rank_parameters",
]
