"""The dispatcher that a configuration asks for."""

from collections.abc import Callable, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from adamoe_dist.config import DispatcherConfig
from adamoe_dist.dispatch.allgather import AllGatherDispatcher
from adamoe_dist.dispatch.alltoall import AllToAllDispatcher
from adamoe_dist.dispatch.base import CountingDispatcher, DispatcherSlot
from adamoe_dist.dispatch.flex import FlexDispatcher, check_flex
from adamoe_dist.dispatch.local import LocalDispatcher
from adamoe_dist.dispatch.padded import PaddedDispatcher


def make_dispatcher(
    dispatcher: DispatcherConfig,
    num_local_experts: int,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    nodes: Sequence[int] = (),
    capacity: Callable[[int], int] | None = None,
) -> CountingDispatcher:
    """Make the dispatcher of one MoE layer.

    Where one rank has all experts whole nothing travels, whatever the type. Where the experts are cut over an
    expert-tensor group it is the all-to-all, also with one expert-parallel rank.

    Args:
        dispatcher: the section ``moe.dispatcher``.
        num_local_experts: L, true experts of this rank.
        config: Megatron's configuration.
        pg_collection: Megatron's process groups.
        nodes: the node of each rank of the expert-parallel group, expert-tensor ranks next to each other; empty: all
            on one.
        capacity: C for a number of tokens, for ``pad_to_capacity``.

    Raises:
        UserError: a library that it needs is missing.
    """
    row_dtype = torch.bfloat16 if dispatcher.dtype == "bf16" else None
    slot = DispatcherSlot(num_local_experts, config, pg_collection, nodes, row_dtype)
    if dispatcher.type == "flex":
        check_flex(dispatcher.flex_backend)
    if dispatcher.pad_to_capacity:
        assert capacity is not None, "moe.dispatcher.pad_to_capacity needs a capacity"
        return PaddedDispatcher(slot, capacity)
    if pg_collection.ep.size() == pg_collection.expt_tp.size() == 1:
        return LocalDispatcher(slot)
    if dispatcher.type == "flex":
        return FlexDispatcher(slot)
    if dispatcher.type == "allgather":
        return AllGatherDispatcher(slot)
    return AllToAllDispatcher(slot, dispatcher.deduplicate)
