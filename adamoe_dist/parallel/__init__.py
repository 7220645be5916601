"""Groups of ranks and the DeepSpeed engine over Megatron's experts."""

from adamoe_dist.parallel.engine import TrainingEngine, deepspeed_config
from adamoe_dist.parallel.groups import Launch, check_port, destroy_groups, expert_group_name, initialize_groups
from adamoe_dist.parallel.optimizer import apex_problem, build_optimizer, choose_implementation, parameter_groups
from adamoe_dist.parallel.watch import sigterm_as_exit, watch_ranks
from adamoe_dist.parallel.wiring import WiringError, checksum_experts, experts_of, verify_wiring

__all__ = [
    "Launch",
    "TrainingEngine",
    "WiringError",
    "apex_problem",
    "build_optimizer",
    "check_port",
    "checksum_experts",
    "choose_implementation",
    "deepspeed_config",
    "destroy_groups",
    "expert_group_name",
    "experts_of",
    "initialize_groups",
    "parameter_groups",
    "sigterm_as_exit",
    "verify_wiring",
    "watch_ranks",
]
