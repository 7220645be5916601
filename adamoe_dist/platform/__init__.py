"""CPU or CUDA: the only room that may ask, and what makes Megatron-core run without CUDA."""

from adamoe_dist.platform import host  # first: it sets what torch's libraries read when they are loaded

# isort: split
from adamoe_dist.platform.deepspeed_cpu import without_compiled_collectives
from adamoe_dist.platform.determinism import fix_order_of_sums
from adamoe_dist.platform.device import (
    communication_backend,
    compute_precision,
    device,
    device_name,
    is_cuda,
    limit_threads,
    peak_memory_gib,
    prepare,
    seed_everything,
    select_device,
    synchronize,
)
from adamoe_dist.platform.extensions import building_alone
from adamoe_dist.platform.random_states import random_states, restore_random_states, seeded_generator

__all__ = [
    "building_alone",
    "communication_backend",
    "compute_precision",
    "device",
    "device_name",
    "fix_order_of_sums",
    "host",
    "is_cuda",
    "limit_threads",
    "peak_memory_gib",
    "prepare",
    "random_states",
    "restore_random_states",
    "seed_everything",
    "seeded_generator",
    "select_device",
    "synchronize",
    "without_compiled_collectives",
]
