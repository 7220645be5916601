"""Which ranks share a machine: the groups of a layout over machines that the launcher fills one after the other.

Megatron numbers ranks with tensor neighbours first, then context, data, and pipeline stages last; for experts with
expert-tensor neighbours first, then expert-parallel, expert-data ranks and stages. So every group is a row of ranks
with one distance between neighbours, and rank r is on machine r // (ranks a machine).
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import NamedTuple

from adamoe_dist.config import Layout


class Shape(NamedTuple):
    """How one group lies: the machines that it is on, its ranks on the emptiest and on the fullest of them."""

    nodes: int
    fewest: int
    most: int


@dataclass(frozen=True)
class Spread:
    """A kind of group over the machines: what its ranks send on average, and what the slowest wait for.

    Attributes:
        size: ranks of a group.
        same_node: other ranks of the group on a rank's own machine, the mean over all ranks.
        other_node: ranks of the group on other machines, the mean.
        shapes: of all groups, each that differs once.
    """

    size: int
    same_node: float
    other_node: float
    shapes: frozenset[Shape]

    @property
    def most_near(self) -> int:
        """Other ranks of the group on the machine of the rank that has most there."""
        return max(shape.most for shape in self.shapes) - 1

    @property
    def most_far(self) -> int:
        """Ranks of the group on other machines, for the rank that has most there."""
        return self.size - min(shape.fewest for shape in self.shapes)


@lru_cache(maxsize=65536)
def spread_of(world_size: int, gpus_per_node: int, size: int, stride: int) -> Spread:
    """Return the spread of the groups of ``size`` ranks that are ``stride`` apart and together make the world."""
    if size == 1:
        return Spread(1, 0.0, 0.0, frozenset([Shape(1, 1, 1)]))
    block = size * stride
    ranks = min(world_size, lcm(block, gpus_per_node))
    groups, same, shapes = 0, 0, set()
    for base in range(0, ranks, block):
        for first in range(base, base + stride):
            on_node = Counter(rank // gpus_per_node for rank in range(first, first + block, stride)).values()
            groups += 1
            same += sum(count * (count - 1) for count in on_node)
            shapes.add(Shape(len(on_node), min(on_node), max(on_node)))
    near = same / (groups * size)
    return Spread(size, near, size - 1 - near, frozenset(shapes))


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
