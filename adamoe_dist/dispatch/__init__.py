"""Who gets which row: the true-expert all-to-all, de-duplication by rank, row and byte counts."""

from adamoe_dist.dispatch.dispatcher import DispatchCount, TrueExpertDispatcher
from adamoe_dist.dispatch.plan import (
    ReceivePlan,
    SendPlan,
    pack_bits,
    plan_receiving,
    plan_sending,
    unpack_bits,
)

__all__ = [
    "DispatchCount",
    "ReceivePlan",
    "SendPlan",
    "TrueExpertDispatcher",
    "pack_bits",
    "plan_receiving",
    "plan_sending",
    "unpack_bits",
]
