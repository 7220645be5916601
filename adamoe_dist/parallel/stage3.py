"""What DeepSpeed's stage 3 has no call for: weights set from outside, and an engine that is closed."""

import inspect

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3


def update_weights_of_stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Make the weights that the model computes with from the masters, as after an update. Collective.

    Weights too small to be sharded are whole on every rank; they are gathered anew.
    """
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    kept = optimizer.persistent_parameters
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


def forget_model(model: torch.nn.Module) -> None:
    """Take a model out of stage 3's tables, which would keep it and its process groups for the life of the process."""
    modules = set(model.modules())
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in modules]
    instrumented = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(instrumented).nonlocals["func"].cache_clear()
