"""The expert computation: grouped products over the rows that exist."""

from adamoe_dist.experts.grouped import GroupedExperts
from adamoe_dist.experts.kernels import KERNELS, choose_kernel

__all__ = ["KERNELS", "GroupedExperts", "choose_kernel"]
