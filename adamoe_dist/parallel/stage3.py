"""What DeepSpeed's stage 3 leaves behind when an engine is closed."""

import inspect

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator


def forget_model(model: torch.nn.Module) -> None:
    """Take a model out of stage 3's tables, which would keep it and its process groups for the life of the process."""
    modules = set(model.modules())
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in modules]
    instrumented = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(instrumented).nonlocals["func"].cache_clear()
