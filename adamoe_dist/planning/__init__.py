"""Parameters, memory, traffic, compute and time of a run before it is started."""

from adamoe_dist.planning.activations import kept_per_token, tokens_of_a_rank
from adamoe_dist.planning.arithmetic import describe_run
from adamoe_dist.planning.compute import flops_per_token, hardware_flops_per_token, layer_flops, output_flops
from adamoe_dist.planning.hardware import DEVICES, Assumptions, Cluster, Device, read_assumptions
from adamoe_dist.planning.memory import PeakMemory, RankMemory, peak_memory, rank_memory
from adamoe_dist.planning.parameters import (
    Parameters,
    RankParameters,
    count_parameters,
    expected_load,
    rank_parameters,
)
from adamoe_dist.planning.placement import Groups, Spread, place, spread_of
from adamoe_dist.planning.plan import Load, Plan, calibrated, make_plan, planned_precision
from adamoe_dist.planning.rows import DispatchRows, dispatch_rows
from adamoe_dist.planning.spread import chance_of_a_rank, load_distribution, mean_load
from adamoe_dist.planning.step import StepTime

__all__ = [
    "DEVICES",
    "Assumptions",
    "Cluster",
    "Device",
    "DispatchRows",
    "Groups",
    "Load",
    "Parameters",
    "PeakMemory",
    "Plan",
    "RankMemory",
    "RankParameters",
    "Spread",
    "StepTime",
    "calibrated",
    "chance_of_a_rank",
    "count_parameters",
    "describe_run",
    "dispatch_rows",
    "expected_load",
    "flops_per_token",
    "hardware_flops_per_token",
    "kept_per_token",
    "layer_flops",
    "load_distribution",
    "make_plan",
    "mean_load",
    "output_flops",
    "peak_memory",
    "place",
    "planned_precision",
    "rank_memory",
    "rank_parameters",
    "read_assumptions",
    "spread_of",
    "tokens_of_a_rank",
]
