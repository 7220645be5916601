"""What a dispatch sends, and how far."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

Count = int | Tensor
"""A number on the host, or a 0-d tensor where knowing it would mean waiting for the device."""

PerRank = Sequence[int] | Tensor
"""A number for each rank of the expert-parallel group (G,)."""

SAME_RANK, SAME_NODE, OTHER_NODE = range(3)


@dataclass(frozen=True)
class DispatchCount:
    """What one forward dispatch of one layer sends for this rank's tokens.

    Where experts are cut over an expert-tensor group, the rank that a row is sent to copies it to the others of its
    group; these copies count for the rank whose token it is. The sums over all ranks are then what was sent.

    Attributes:
        rows_same_rank: Hidden vectors for this rank's own experts.
        rows_same_node: Hidden vectors sent to other ranks of the sender's node.
        rows_other_node: Hidden vectors sent to other nodes.
        rows_undeduplicated: Hidden vectors to other ranks that one row per (token, true expert) would have been.
        bytes_same_node: To other ranks of the sender's node: the rows, their combine weights and the routing bits.
        bytes_other_node: To other nodes, the same.
    """

    rows_same_rank: Count = 0
    rows_same_node: Count = 0
    rows_other_node: Count = 0
    rows_undeduplicated: Count = 0
    bytes_same_node: Count = 0
    bytes_other_node: Count = 0

    @classmethod
    def of(cls, placement: "Placement", rows_G: "PerRank", pairs_G: "PerRank", bytes_G: "PerRank") -> "DispatchCount":
        """Count by distance what goes to each rank G: rows, pairs (token, true expert), and bytes in all."""
        _, bytes_same_node, bytes_other_node = placement.by_distance(bytes_G)
        return cls(*placement.by_distance(rows_G), placement.remote(pairs_G), bytes_same_node, bytes_other_node)

    @property
    def rows(self) -> Count:
        """Hidden vectors sent to *other* ranks."""
        return self.rows_same_node + self.rows_other_node

    @property
    def bytes(self) -> Count:
        """Bytes sent to *other* ranks."""
        return self.bytes_same_node + self.bytes_other_node


class Placement:
    """Where the ranks that share a layer's experts are, seen from one of them."""

    def __init__(
        self, here: int, ranks: int, nodes: Sequence[int] = (), tensor_here: int = 0, tensor_ranks: int = 1
    ) -> None:
        """Place the ranks.

        Args:
            here: this rank in the expert-parallel group.
            ranks: G, the size of that group.
            nodes: the node of each rank (G x X,), expert-tensor ranks next to each other; empty: all on one.
            tensor_here: this rank in the expert-tensor group.
            tensor_ranks: X, the size of that group.
        """
        total = ranks * tensor_ranks
        assert not nodes or len(nodes) == total, (
            f"{len(nodes)} nodes given for {ranks} expert-parallel x {tensor_ranks} expert-tensor ranks"
        )
        self.here = here
        where = list(nodes) or [0] * total
        self.hops_DG = [[0] * ranks for _ in (SAME_RANK, SAME_NODE, OTHER_NODE)]
        """How often a row for rank g goes each distance D: to g, and from there to the rest of its tensor group."""
        for rank in range(ranks):
            landing = rank * tensor_ranks + tensor_here
            first = SAME_RANK if rank == here else _distance(where, here * tensor_ranks + tensor_here, landing)
            self.hops_DG[first][rank] += 1
            for copy in range(rank * tensor_ranks, (rank + 1) * tensor_ranks):
                if copy != landing:
                    self.hops_DG[_distance(where, landing, copy)][rank] += 1
        self._hops_on_device: Tensor | None = None

    @classmethod
    def in_groups(cls, groups: ProcessGroupCollection, nodes: Sequence[int] = ()) -> "Placement":
        """Place this rank in Megatron's groups."""
        return cls(groups.ep.rank(), groups.ep.size(), nodes, groups.expt_tp.rank(), groups.expt_tp.size())

    @property
    def ranks(self) -> int:
        """G, the size of the expert-parallel group."""
        return len(self.hops_DG[0])

    def by_distance(self, per_rank_G: PerRank) -> tuple[Count, Count, Count]:
        """Sum what each rank is sent into (same rank, same node, other node); a tensor's sums stay on its device."""
        if isinstance(per_rank_G, Tensor):
            if self._hops_on_device is None or self._hops_on_device.device != per_rank_G.device:
                self._hops_on_device = torch.tensor(self.hops_DG, device=per_rank_G.device)
            same_rank, same_node, other_node = (self._hops_on_device * per_rank_G).sum(dim=1)
            return same_rank, same_node, other_node
        same_rank, same_node, other_node = (
            sum(hops * count for hops, count in zip(hops_G, per_rank_G, strict=True)) for hops_G in self.hops_DG
        )
        return same_rank, same_node, other_node

    def remote(self, per_rank_G: PerRank) -> Count:
        """Sum what is sent to other ranks."""
        _, same_node, other_node = self.by_distance(per_rank_G)
        return same_node + other_node


def _distance(nodes: Sequence[int], source: int, destination: int) -> int:
    return SAME_NODE if nodes[source] == nodes[destination] else OTHER_NODE


def pairs_per_rank(routing_map_TE: Tensor, ranks: int) -> Tensor:
    """Count the pairs (token, true expert) of each rank's experts: (G,), on the device."""
    return routing_map_TE.sum(dim=0).view(ranks, -1).sum(dim=1)
