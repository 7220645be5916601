"""The training loop and its callbacks, one file each."""

from adamoe_dist.training.command import finetune, pretrain

__all__ = ["finetune", "pretrain"]
