"""Rows and bytes of a layer's dispatch by distance, expected from the load and the placement."""

from dataclasses import dataclass
from math import ceil

from adamoe_dist.config import Config, Layout
from adamoe_dist.planning.placement import Groups
from adamoe_dist.planning.spread import chance_of_a_rank, mean_load

WEIGHT_BYTES = 4
"""A combine weight: the router computes in fp32."""


@dataclass(frozen=True, kw_only=True)
class DispatchRows:
    """What one forward dispatch of a layer sends for a rank's tokens, as the run's metrics count it.

    All are means over ranks but ``most_near`` and ``most_far``: the ranks, copies counted, to which those with most
    of them on their own machine and on others send. ``bytes_to_a_rank`` are rows, combine weights and routing bits.
    ``undeduplicated_*`` are the (token, true expert) pairs whose expert is there.
    """

    same_rank: float
    same_node: float
    other_node: float
    undeduplicated_near: float
    undeduplicated_far: float
    row_bytes: int
    bytes_to_a_rank: float
    bytes_same_node: float
    bytes_other_node: float
    most_near: float
    most_far: float

    @property
    def rows(self) -> float:
        """Rows to other ranks."""
        return self.same_node + self.other_node

    @property
    def undeduplicated(self) -> float:
        """Rows to other ranks that one row per (token, true expert) would be."""
        return self.undeduplicated_near + self.undeduplicated_far

    @property
    def bytes(self) -> float:
        """Bytes to other ranks."""
        return self.bytes_same_node + self.bytes_other_node


def row_bytes(config: Config, precision: str) -> int:
    """Return the bytes of one hidden vector on the way."""
    is_16 = precision != "fp32" or config.moe.dispatcher.dtype == "bf16"
    return config.model.hidden_size * (2 if is_16 else 4)


def is_deduplicated(config: Config) -> bool:
    """Tell whether a token travels once to a rank that holds several of its experts."""
    dispatcher = config.moe.dispatcher
    return config.moe.router.type != "topk" and dispatcher.deduplicate and not dispatcher.pad_to_capacity


def dispatch_rows(
    config: Config, layout: Layout, groups: Groups, tokens: float, distribution: tuple[float, ...], precision: str
) -> DispatchRows:
    """Return what ``tokens`` tokens of a rank send in one MoE layer, forward.

    Every expert-parallel rank is as likely as any other. With cut experts a row is sent to one rank of an
    expert-tensor group, which copies it to the others; copies of rows that stay count too, by their own distance.

    Args:
        config: the tree.
        layout: its degrees.
        groups: where they are.
        tokens: T, of one rank.
        distribution: P(x) of a token's true experts.
        precision: of the model.
    """
    moe, width = config.moe, row_bytes(config, precision)
    pairs = tokens * mean_load(distribution) / layout.expert
    rows = pairs
    if moe.dispatcher.type == "allgather":
        rows = tokens
    elif moe.dispatcher.pad_to_capacity:
        factor = moe.router.capacity_factor or 1.0
        rows = moe.num_experts / layout.expert * ceil(tokens * factor * moe.expected_load / moe.num_experts)
    elif is_deduplicated(config):
        rows = tokens * chance_of_a_rank(moe.num_experts, layout.expert, distribution)
    expert, copies = groups.expert, groups.expert_tensor
    near = expert.same_node + layout.expert * copies.same_node
    far = expert.other_node + layout.expert * copies.other_node
    weights = {"allgather": tokens * moe.num_experts}.get(moe.dispatcher.type, pairs)
    if moe.dispatcher.pad_to_capacity:
        weights = rows
    bits = tokens * ceil(moe.num_experts / layout.expert / 8) if _sends_bits(config) else 0.0
    each = rows * width + weights * WEIGHT_BYTES + bits
    return DispatchRows(
        same_rank=rows,
        same_node=rows * near,
        other_node=rows * far,
        undeduplicated_near=pairs * near,
        undeduplicated_far=pairs * far,
        row_bytes=width,
        bytes_to_a_rank=each,
        bytes_same_node=each * near,
        bytes_other_node=each * far,
        most_near=expert.most_near + layout.expert * copies.most_near,
        most_far=expert.most_far + layout.expert * copies.most_far,
    )


def _sends_bits(config: Config) -> bool:
    """Tell whether routing bits travel: not with fixed shapes, Megatron's own dispatch or DeepEP."""
    return (
        config.moe.router.type != "topk"
        and not config.moe.dispatcher.pad_to_capacity
        and config.moe.dispatcher.type != "flex"
    )
