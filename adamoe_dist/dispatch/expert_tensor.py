"""The exchange within an expert-tensor group, whose ranks hold slices of the same experts.

Each rank of the group needs every row that any of them received, and has a partial sum of each row's output. So the
rows are gathered before the experts, and after them the partial sums are reduced and scattered. Ranks receive different
numbers of rows: these are all-to-alls with uneven parts, which every backend has.

Bytes: with X ranks each row is sent to X - 1 others and as many partial sums of it come back. That is the floor: all X
must have the row, and each of them has a part of its sum.

Order: this rank's part first, then the others' by rank. One's own rows are then never in what is sent, and the partial
sums for the others need no copy.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from adamoe_dist.dispatch.exchange import Pending, gather


@dataclass(frozen=True)
class Parts:
    """How much each rank of a group has: ``mine``, and ``others`` by rank without this one."""

    group: dist.ProcessGroup
    mine: int
    others: list[int]

    @property
    def from_others(self) -> list[int]:
        """The others' sizes, by rank of the group, and 0 for this rank."""
        here = self.group.rank()
        return [*self.others[:here], 0, *self.others[here:]]

    @property
    def to_others(self) -> list[int]:
        """This rank's size for each other rank, and 0 for itself."""
        here = self.group.rank()
        return [0 if rank == here else self.mine for rank in range(self.group.size())]


@dataclass(frozen=True)
class GatherParts(Parts):
    """Every rank gets everyone's entries; the gradient of a rank's entries is the sum of what all ranks return."""

    def send(self, rows: Tensor) -> tuple[Tensor, Pending]:
        """Start gathering (mine, ...) into (mine + sum(others), ...)."""
        gathered = rows.new_empty((self.mine + sum(self.others), *rows.shape[1:]))
        gathered[: self.mine].copy_(rows)
        copies = rows if len(self.others) == 1 else rows.repeat(len(self.others), *[1] * (rows.ndim - 1))
        arriving = gathered[self.mine :]
        work = dist.all_to_all_single(
            arriving, copies, self.from_others, self.to_others, group=self.group, async_op=True
        )
        return gathered, _Holding(work, copies)

    def send_back(self, gradient: Tensor) -> tuple[Tensor, Pending]:
        """Start summing everyone's gradients into this rank's (mine, ...)."""
        return SumParts(self.group, self.mine, self.others).send(gradient)


@dataclass(frozen=True)
class SumParts(Parts):
    """Every rank gets the sum over all ranks of the part that is its own; the gradient is gathered."""

    def send(self, rows: Tensor) -> tuple[Tensor, Pending]:
        """Start summing (mine + sum(others), ...) into (mine, ...)."""
        own, leaving = rows.split([self.mine, sum(self.others)])
        arriving = rows.new_empty((len(self.others) * self.mine, *rows.shape[1:]))
        work = dist.all_to_all_single(
            arriving, leaving, self.to_others, self.from_others, group=self.group, async_op=True
        )
        total = torch.empty_like(own)
        return total, _Adding(work, own, arriving.view(len(self.others), *own.shape), total)

    def send_back(self, gradient: Tensor) -> tuple[Tensor, Pending]:
        """Start gathering this rank's gradient for everyone."""
        return GatherParts(self.group, self.mine, self.others).send(gradient)


@dataclass(frozen=True)
class _Holding:
    """A collective that still reads a copy."""

    work: Pending
    copies: Tensor

    def wait(self) -> None:
        self.work.wait()


@dataclass(frozen=True)
class _Adding:
    """A collective that is done once what came is added up, in fp32 or the rows' own precision if that is higher."""

    work: Pending
    own: Tensor
    arriving: Tensor
    total: Tensor

    def wait(self) -> None:
        self.work.wait()
        precise = torch.promote_types(self.own.dtype, torch.float32)
        self.total.copy_(self.arriving.sum(dim=0, dtype=precise).add_(self.own))


def gather_bits(packed_GTB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the packed bits that each rank of the group received, (X, G, T, B), this rank's first."""
    ranks, here = group.size(), group.rank()
    if ranks == 1:
        return packed_GTB.unsqueeze(0)
    by_rank_XGTB = gather(packed_GTB, group).view(ranks, *packed_GTB.shape)
    return torch.cat([by_rank_XGTB[here : here + 1], by_rank_XGTB[:here], by_rank_XGTB[here + 1 :]])
