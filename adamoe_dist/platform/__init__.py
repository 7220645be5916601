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
    gpu_name,
    is_cuda,
    limit_threads,
    peak_memory_gib,
    prepare,
    seed_everything,
    select_device,
    synchronize,
)
from adamoe_dist.platform.extensions import building_alone
from adamoe_dist.platform.profiling import (
    is_under_nsight,
    pop_device_range,
    profiled_activities,
    push_device_range,
    start_memory_history,
    stop_memory_history,
)
from adamoe_dist.platform.random_states import random_states, restore_random_states, seeded_generator
from adamoe_dist.platform.stream_clock import StreamClock

__all__ = [
    "StreamClock",
    "building_alone",
    "communication_backend",
    "compute_precision",
    "device",
    "device_name",
    "fix_order_of_sums",
    "gpu_name",
    "host",
    "is_cuda",
    "is_under_nsight",
    "limit_threads",
    "peak_memory_gib",
    "pop_device_range",
    "prepare",
    "profiled_activities",
    "push_device_range",
    "random_states",
    "restore_random_states",
    "seed_everything",
    "seeded_generator",
    "select_device",
    "start_memory_history",
    "stop_memory_history",
    "synchronize",
    "without_compiled_collectives",
]
