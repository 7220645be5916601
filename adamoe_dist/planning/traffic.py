"""Seconds of every exchange of a step: what travels, between whom, over which link."""

from dataclasses import dataclass

from adamoe_dist.config import Config, Resolved
from adamoe_dist.planning.activations import tokens_of_a_rank
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.parameters import RankParameters
from adamoe_dist.planning.placement import Groups, Spread
from adamoe_dist.planning.rows import WEIGHT_BYTES, DispatchRows


@dataclass(frozen=True)
class Links:
    """The two distances: bytes a second that a rank's collectives reach, and what starting one takes."""

    near: float
    far: float
    latency_s: float

    @classmethod
    def of(cls, cluster: Cluster, assumptions: Assumptions) -> "Links":
        """Take the rates of a cluster and the parts of them that collectives reach."""
        device = cluster.device
        return cls(
            1e9 * device.intra_node_gb_s * assumptions.intra_efficiency,
            1e9 * device.inter_node_gb_s * assumptions.inter_efficiency,
            1e-6 * assumptions.latency_us,
        )

    def exchange(self, near_bytes: float, far_bytes: float) -> float:
        """Return the time of an all-to-all in which a rank sends so much: both distances are under way at once."""
        if near_bytes + far_bytes == 0:
            return 0.0
        return self.latency_s + max(near_bytes / self.near, far_bytes / self.far)

    def scatter(self, size: float, spread: Spread) -> float:
        """Return the time of a reduce-scatter, or of an all-gather, of ``size`` bytes: first near, then far.

        With r ranks of the group on each of its M nodes each rank passes (r - 1) / r of it near, and of the r-th part
        that is left (M - 1) / M far, all ports of a node at once. On uneven nodes the fullest has most to pass near
        and the emptiest, with the fewest ports, most to pass far. All wait for the slowest group.
        """
        if spread.size == 1 or size == 0:
            return 0.0
        times = (
            size * (1 - 1 / most) / self.near + size / fewest * (1 - 1 / nodes) / self.far
            for nodes, fewest, most in spread.shapes
        )
        return self.latency_s + max(times)

    def relay(self, size: float, spread: Spread, count: int) -> float:
        """Return the time of ``count`` messages through a row of ranks, each handed from neighbour to neighbour.

        The first goes all the way; the others follow at the pace of the slowest link of any group.
        """
        if spread.size == 1:
            return 0.0
        crossings = max(shape.nodes for shape in spread.shapes) - 1
        near, far = self.latency_s + size / self.near, self.latency_s + size / self.far
        whole_way = crossings * far + (spread.size - 1 - crossings) * near
        return whole_way + (count - 1) * (far if crossings else near)


@dataclass(frozen=True, kw_only=True)
class DispatchTime:
    """Seconds of one layer's row exchanges for one micro-batch: there, and back; each backward the same again."""

    bits: float
    there: float
    back: float


def dispatch_time(rows: DispatchRows, links: Links, imbalance: float) -> DispatchTime:
    """Return the time of a dispatch: all wait for the fullest rank, ``imbalance`` times the mean, and the farthest."""
    if rows.rows == 0:
        return DispatchTime(bits=0.0, there=0.0, back=0.0)
    near, far = rows.most_near * imbalance, rows.most_far * imbalance
    rows_back = rows.same_rank * rows.row_bytes
    return DispatchTime(
        bits=links.latency_s,
        there=links.exchange(near * rows.bytes_to_a_rank, far * rows.bytes_to_a_rank),
        back=links.exchange(near * rows_back, far * rows_back),
    )


def dispatch_bytes_of_layer(rows: DispatchRows, full_recompute: bool) -> tuple[float, float]:
    """Return the bytes to the same and to other nodes that a rank sends for one layer: forward and backward.

    Rows go there and back, in both passes; weights there, and their gradients back; routing bits once a forward pass.
    """
    again = 2 if full_recompute else 1
    near_rows, far_rows = rows.same_node * rows.row_bytes, rows.other_node * rows.row_bytes
    near = again * (rows.bytes_same_node + near_rows) + 2 * near_rows + rows.undeduplicated_near * WEIGHT_BYTES
    far = again * (rows.bytes_other_node + far_rows) + 2 * far_rows + rows.undeduplicated_far * WEIGHT_BYTES
    return near, far


def tensor_time(config: Config, resolved: Resolved, links: Links, groups: Groups, size: int, inner: bool) -> float:
    """Return the seconds of one layer's tensor-parallel collectives, forward and backward, for one micro-batch.

    With sequence parallelism a pair of matrices (first cut by columns, second by rows) gathers its input and scatters
    its sum, and backward gathers the sum's gradient, gathers the input again and scatters the input's gradient: five
    collectives of the rank's sequence. True experts have none: tokens are dispatched as they are cut.

    Args:
        config: the tree.
        resolved: its arithmetic.
        links: the rates.
        groups: the placement.
        size: bytes of an element.
        inner: whether the layer has a feed-forward, or a shared expert, that is cut besides attention.
    """
    tokens = tokens_of_a_rank(config, resolved) * resolved.layout.tensor
    one = links.scatter(tokens * config.model.hidden_size * size, groups.tensor)
    again = 2 if config.train.recompute == "full" else 0
    return (5 + again) * one * (2 if inner else 1)


def context_time(config: Config, resolved: Resolved, links: Links, groups: Groups, size: int) -> float:
    """Return the seconds of one layer's exchange of sequence for heads, forward and backward, for one micro-batch."""
    spread = groups.context
    if spread.size == 1:
        return 0.0
    model, layout = config.model, resolved.layout
    keys = (model.num_query_groups or model.num_attention_heads) * model.head_width
    queries = model.num_attention_heads * model.head_width
    tokens = resolved.micro_batch_size * model.sequence_length / layout.context
    passes = 3 if config.train.recompute == "full" else 2
    total = 0.0
    for width in (queries + 2 * keys, queries):
        part = tokens * width * size / layout.tensor / spread.size
        total += passes * links.exchange(part * spread.most_near, part * spread.most_far)
    return total


@dataclass(frozen=True, kw_only=True)
class ZeroTime:
    """Seconds of ZeRO's collectives.

    ``per_step`` come once, after the last backward pass; ``per_micro_batch`` in every backward pass; ``gathers`` of
    stage 3 in every forward and backward pass.
    """

    per_step: float
    per_micro_batch: float
    gathers: float


def zero_time(config: Config, local: RankParameters, links: Links, groups: Groups, weight_bytes: int) -> ZeroTime:
    """Return the time of reducing gradients, in fp32, and of gathering weights.

    Stages 0 to 2 reduce to all (DeepSpeed reduces a bucket of several ranks' shards so, and keeps its own part): once
    a step, in stage 2 once a micro-batch. Stages 1 and 2 gather the updated weights. Stage 3 scatters the sum, and
    gathers weights for the forward and for the backward pass of every micro-batch.
    """
    stage = config.zero.stage

    def both(size: int) -> float:
        return links.scatter(local.dense * size, groups.replicas) + links.scatter(
            local.expert * size, groups.expert_data
        )

    reduced, gathered = both(4), both(weight_bytes)
    if stage == 3:
        return ZeroTime(per_step=0.0, per_micro_batch=reduced, gathers=2 * gathered)
    if stage == 2:
        return ZeroTime(per_step=gathered, per_micro_batch=2 * reduced, gathers=0.0)
    return ZeroTime(per_step=2 * reduced + (gathered if stage == 1 else 0.0), per_micro_batch=0.0, gathers=0.0)
