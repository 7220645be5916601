"""The expert computation: grouped products over the rows that exist."""

from adamoe_dist.experts.adapted import AdaptedExperts
from adamoe_dist.experts.grouped import GroupedExperts, slice_down, slice_gate_up
from adamoe_dist.experts.kernels import KERNELS, choose_kernel

__all__ = ["KERNELS", "AdaptedExperts", "GroupedExperts", "choose_kernel", "slice_down", "slice_gate_up"]
