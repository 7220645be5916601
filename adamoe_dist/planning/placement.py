"""Which ranks share a machine: the groups of a layout over machines that the launcher fills one after the other.

Megatron numbers ranks with tensor neighbours first, then context, data, and pipeline stages last; for experts with
expert-tensor neighbours first, then expert-parallel, expert-data ranks and stages. So every group is a row of ranks
with one distance between neighbours, and rank r is on machine r // (ranks a machine).
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import lcm

from adamoe_dist.config import Layout


@dataclass(frozen=True)
class Spread:
    """A kind of group over the machines, as a mean over all its groups.

    Attributes:
        size: ranks of a group.
        nodes: machines that a group is on.
        same_node: other ranks of the group on a rank's own machine.
        other_node: ranks of the group on other machines.
    """

    size: int
    nodes: float
    same_node: float
    other_node: float

    @property
    def per_node(self) -> float:
        """Ranks of a group on one of its machines."""
        return self.size / self.nodes


@lru_cache(maxsize=65536)
def spread_of(world_size: int, gpus_per_node: int, size: int, stride: int) -> Spread:
    """Return the spread of the groups of ``size`` ranks that are ``stride`` apart and together make the world."""
    if size == 1:
        return Spread(1, 1.0, 0.0, 0.0)
    block = size * stride
    ranks = min(world_size, lcm(block, gpus_per_node))
    groups, nodes, same = 0, 0, 0
    for base in range(0, ranks, block):
        for first in range(base, base + stride):
            on_node = Counter(rank // gpus_per_node for rank in range(first, first + block, stride))
            groups += 1
            nodes += len(on_node)
            same += sum(count * (count - 1) for count in on_node.values())
    near = same / (groups * size)
    return Spread(size, nodes / groups, near, size - 1 - near)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The spread of every kind of group of a layout."""

    tensor: Spread
    context: Spread
    pipeline: Spread
    replicas: Spread
    """Data times context: the ranks that hold the same dense weights."""
    expert: Spread
    expert_tensor: Spread
    expert_data: Spread


def place(layout: Layout, gpus_per_node: int) -> Groups:
    """Place a layout on machines of so many ranks."""

    def spread(size: int, stride: int) -> Spread:
        return spread_of(layout.world_size, gpus_per_node, size, stride)

    share = layout.expert_tensor * layout.expert
    return Groups(
        tensor=spread(layout.tensor, 1),
        context=spread(layout.context, layout.tensor),
        pipeline=spread(layout.pipeline, layout.stage_ranks),
        replicas=spread(layout.replicas, layout.tensor),
        expert=spread(layout.expert, layout.expert_tensor),
        expert_tensor=spread(layout.expert_tensor, 1),
        expert_data=spread(layout.expert_data, share),
    )
