"""Memory, parameters and compute of a run before it is started."""

from adamoe_dist.planning.arithmetic import (
    Parameters,
    RankMemory,
    count_parameters,
    describe_run,
    expected_load,
    flops_per_token,
    rank_memory,
)

__all__ = [
    "Parameters",
    "RankMemory",
    "count_parameters",
    "describe_run",
    "expected_load",
    "flops_per_token",
    "rank_memory",
]
