"""The training loop and its callbacks, one file each."""

from adamoe_dist.training.command import pretrain

__all__ = ["pretrain"]
