"""What a dispatch sends, and how far."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Count = int | Tensor
"""A number on the host, or a 0-d tensor where knowing it would mean waiting for the device."""

SAME_RANK, SAME_NODE, OTHER_NODE = range(3)


@dataclass(frozen=True)
class DispatchCount:
    """What one forward dispatch of one layer sent from this rank.

    Attributes:
        rows_same_rank: Hidden vectors for this rank's own experts.
        rows_same_node: Hidden vectors sent to other ranks of this node.
        rows_other_node: Hidden vectors sent to other nodes.
        rows_undeduplicated: Hidden vectors to other ranks that one row per (token, true expert) would have been.
        bytes: To other ranks: the rows, their combine weights and the routing bits.
    """

    rows_same_rank: Count = 0
    rows_same_node: Count = 0
    rows_other_node: Count = 0
    rows_undeduplicated: Count = 0
    bytes: Count = 0

    @property
    def rows(self) -> Count:
        """Hidden vectors sent to *other* ranks."""
        return self.rows_same_node + self.rows_other_node


class Placement:
    """Where the ranks of an expert-parallel group are, seen from one of them."""

    def __init__(self, here: int, ranks: int, nodes: Sequence[int] = ()) -> None:
        """Place the ranks.

        Args:
            here: this rank in the group.
            ranks: G, the size of the group.
            nodes: the node of each rank; empty: all on one.
        """
        assert not nodes or len(nodes) == ranks, f"{len(nodes)} nodes given for {ranks} ranks"
        self.here = here
        self.distances = [
            SAME_RANK if rank == here else SAME_NODE if not nodes or nodes[rank] == nodes[here] else OTHER_NODE
            for rank in range(ranks)
        ]
        self._distance_G: Tensor | None = None

    def by_distance(self, per_rank_G: Sequence[int] | Tensor) -> tuple[Count, Count, Count]:
        """Sum what each rank is sent into (same rank, same node, other node); a tensor's sums stay on its device."""
        if isinstance(per_rank_G, Tensor):
            if self._distance_G is None or self._distance_G.device != per_rank_G.device:
                self._distance_G = torch.tensor(self.distances, device=per_rank_G.device)
            same_rank, same_node, other_node = per_rank_G.new_zeros(3).index_add(0, self._distance_G, per_rank_G)
            return same_rank, same_node, other_node
        sums = [0, 0, 0]
        for distance, count in zip(self.distances, per_rank_G, strict=True):
            sums[distance] += count
        return sums[0], sums[1], sums[2]

    def remote(self, per_rank_G: Sequence[int] | Tensor) -> Count:
        """Sum what the other ranks are sent."""
        _, same_node, other_node = self.by_distance(per_rank_G)
        return same_node + other_node


def pairs_per_rank(routing_map_TE: Tensor, ranks: int) -> Tensor:
    """Count the pairs (token, true expert) of each rank's experts: (G,), on the device."""
    return routing_map_TE.sum(dim=0).view(ranks, -1).sum(dim=1)
