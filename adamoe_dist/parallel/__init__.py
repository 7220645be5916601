"""Groups of ranks and the DeepSpeed engine over Megatron's experts."""

from adamoe_dist.parallel.buckets import trained_elements
from adamoe_dist.parallel.engine import TrainingEngine, deepspeed_config
from adamoe_dist.parallel.groups import (
    COLLECTIVE_TIMEOUT,
    Launch,
    check_port,
    data_parallel_rank,
    destroy_groups,
    expert_group_name,
    initialize_groups,
    nodes_of_ranks,
    place_of_rank,
    replicas_group,
    stage_group,
)
from adamoe_dist.parallel.health import has_finite_weights
from adamoe_dist.parallel.live import LiveBytes, live_bytes
from adamoe_dist.parallel.optimizer import (
    apex_problem,
    build_optimizer,
    choose_implementation,
    cpu_adam_problem,
    is_trained,
    parameter_groups,
)
from adamoe_dist.parallel.pipeline import Schedule, sum_of
from adamoe_dist.parallel.progress import TRAINING, Progress
from adamoe_dist.parallel.stage3 import update_weights_of_stage_3
from adamoe_dist.parallel.unsharded import UnshardedOptimizer
from adamoe_dist.parallel.watch import sigterm_as_exit, watch_ranks
from adamoe_dist.parallel.wiring import WiringError, checksum_experts, experts_of, verify_wiring

__all__ = [
    "COLLECTIVE_TIMEOUT",
    "TRAINING",
    "Launch",
    "LiveBytes",
    "Progress",
    "Schedule",
    "TrainingEngine",
    "UnshardedOptimizer",
    "WiringError",
    "apex_problem",
    "build_optimizer",
    "check_port",
    "checksum_experts",
    "choose_implementation",
    "cpu_adam_problem",
    "data_parallel_rank",
    "deepspeed_config",
    "destroy_groups",
    "expert_group_name",
    "experts_of",
    "has_finite_weights",
    "initialize_groups",
    "is_trained",
    "live_bytes",
    "nodes_of_ranks",
    "parameter_groups",
    "place_of_rank",
    "replicas_group",
    "sigterm_as_exit",
    "stage_group",
    "sum_of",
    "trained_elements",
    "update_weights_of_stage_3",
    "verify_wiring",
    "watch_ranks",
]
