"""Who gets which row: the dispatchers, the plans they share, row and byte counts by distance."""

from adamoe_dist.dispatch.allgather import AllGatherDispatcher
from adamoe_dist.dispatch.alltoall import AllToAllDispatcher
from adamoe_dist.dispatch.base import CountingDispatcher, DispatcherSlot
from adamoe_dist.dispatch.choice import make_dispatcher
from adamoe_dist.dispatch.counts import DispatchCount, Placement, pairs_per_rank
from adamoe_dist.dispatch.flex import FlexDispatcher, check_flex
from adamoe_dist.dispatch.local import LocalDispatcher
from adamoe_dist.dispatch.padded import PaddedDispatcher

__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "CountingDispatcher",
    "DispatchCount",
    "DispatcherSlot",
    "FlexDispatcher",
    "LocalDispatcher",
    "PaddedDispatcher",
    "Placement",
    "check_flex",
    "make_dispatcher",
    "pairs_per_rank",
]
