"""How many weights a rank trains, from which the sizes of DeepSpeed's buffers follow."""

import torch

from adamoe_dist.parallel.optimizer import is_trained


def trained_elements(model: torch.nn.Module) -> int:
    """Return the elements that the optimizer updates on this rank; ranks that reduce together have the same number."""
    return sum(parameter.numel() for parameter in model.parameters() if is_trained(parameter))
