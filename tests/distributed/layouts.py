"""Layouts in which the ranks of one pipeline stage share sequences, experts and experts' matrices."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Degrees of a set of ranks; without expert-data ranks, ``expert x expert_tensor`` of them."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def ranks(self) -> int:
        return self.expert * self.expert_tensor

    def __str__(self) -> str:
        return f"tp{self.tensor}ep{self.expert}etp{self.expert_tensor}"


def open_groups(layout: Layout) -> None:
    """Megatron's groups of a layout, on every one of its ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    assert dist.get_world_size() == layout.ranks
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )


def close_groups() -> None:
    from adamoe_dist.parallel import destroy_groups

    destroy_groups()
