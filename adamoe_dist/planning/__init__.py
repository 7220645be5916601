"""Parameters, memory, traffic, compute and time of a run before it is started."""

from adamoe_dist.planning.activations import kept_per_token, tokens_of_a_rank
from adamoe_dist.planning.arithmetic import describe_run
from adamoe_dist.planning.compute import flops_per_token, hardware_flops_per_token, layer_flops, output_flops
from adamoe_dist.planning.hardware import DEVICES, Assumptions, Cluster, Device, find_device, read_assumptions
from adamoe_dist.planning.memory import PeakMemory, RankMemory, peak_memory, rank_memory
from adamoe_dist.planning.output import config_text, planned_config, slurm_text
from adamoe_dist.planning.parameters import (
    Parameters,
    RankParameters,
    count_parameters,
    expected_load,
    rank_parameters,
)
from adamoe_dist.planning.placement import Groups, Spread, place, spread_of
from adamoe_dist.planning.plan import Load, Plan, calibrated, make_plan, memory_by_stage, planned_precision
from adamoe_dist.planning.report import (
    as_json,
    assumption_lines,
    plan_lines,
    search_table,
    stage_table,
    stages_as_json,
    sweep_table,
)
from adamoe_dist.planning.rows import DispatchRows, dispatch_rows
from adamoe_dist.planning.search import Found, count_layouts, search, shortage
from adamoe_dist.planning.space import Space
from adamoe_dist.planning.spread import chance_of_a_rank, load_distribution, mean_load
from adamoe_dist.planning.step import StepTime
from adamoe_dist.planning.sweep import Point, baseline, nodes_of, sweep

__all__ = [
    "DEVICES",
    "Assumptions",
    "Cluster",
    "Device",
    "DispatchRows",
    "Found",
    "Groups",
    "Load",
    "Parameters",
    "PeakMemory",
    "Plan",
    "Point",
    "RankMemory",
    "RankParameters",
    "Space",
    "Spread",
    "StepTime",
    "as_json",
    "assumption_lines",
    "baseline",
    "calibrated",
    "chance_of_a_rank",
    "config_text",
    "count_layouts",
    "count_parameters",
    "describe_run",
    "dispatch_rows",
    "expected_load",
    "find_device",
    "flops_per_token",
    "hardware_flops_per_token",
    "kept_per_token",
    "layer_flops",
    "load_distribution",
    "make_plan",
    "mean_load",
    "memory_by_stage",
    "nodes_of",
    "output_flops",
    "peak_memory",
    "place",
    "plan_lines",
    "planned_config",
    "planned_precision",
    "rank_memory",
    "rank_parameters",
    "read_assumptions",
    "search",
    "search_table",
    "shortage",
    "slurm_text",
    "spread_of",
    "stage_table",
    "stages_as_json",
    "sweep",
    "sweep_table",
    "tokens_of_a_rank",
]
