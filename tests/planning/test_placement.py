"""Where groups are, and rows by distance, against the numbering of ranks spelled out and the dispatcher's own count."""

from itertools import product

import pytest

from adamoe_dist.config import config_from_dict, resolve
from adamoe_dist.dispatch.counts import Placement
from adamoe_dist.planning import dispatch_rows, load_distribution, place
from tests.distributed.cases import BASE, merged

LAYOUTS = [
    (16, 4, {"expert": 8}),
    (16, 8, {"expert": 8, "tensor": 2}),
    (16, 4, {"expert": 4, "expert_tensor": 2, "tensor": 2}),
    (24, 6, {"expert": 4, "expert_tensor": 2, "pipeline": 3}),
    (20, 5, {"expert": 4, "context": 2}),
    (8, 8, {"expert": 1}),
    (12, 6, {"expert": 4}),
    (24, 6, {"expert": 8, "tensor": 4}),
]


def resolved(world: int, degrees: dict[str, int], changes: dict | None = None):
    tree = merged(BASE, {"parallel": degrees, "model": {"num_layers": 3}, "train": {"global_batch_size": 480}})
    config = config_from_dict(merged(tree, changes or {}))
    return config, resolve(config, world)


def coordinates(sizes: tuple[int, ...], world: int) -> dict[tuple[int, ...], int]:
    """Ranks by their place along each axis, the first axis innermost."""
    places = (tuple(reversed(place)) for place in product(*(range(size) for size in reversed(sizes))))
    found = {place: rank for rank, place in enumerate(places)}
    assert len(found) == world
    return found


@pytest.mark.parametrize(("world", "per_node", "degrees"), LAYOUTS)
def test_groups_are_where_megatron_numbers_them(world: int, per_node: int, degrees: dict[str, int]) -> None:
    _, arithmetic = resolved(world, degrees)
    layout = arithmetic.layout
    groups = place(layout, per_node)
    dense = coordinates((layout.tensor, layout.context, layout.data, layout.pipeline), world)
    sparse = coordinates((layout.expert_tensor, layout.expert, layout.expert_data, layout.pipeline), world)
    for ranks, axes, spread in (
        (dense, (0,), groups.tensor),
        (dense, (1,), groups.context),
        (dense, (1, 2), groups.replicas),
        (dense, (3,), groups.pipeline),
        (sparse, (0,), groups.expert_tensor),
        (sparse, (1,), groups.expert),
        (sparse, (2,), groups.expert_data),
    ):
        near, far = [0] * world, [0] * world
        for (mine, rank), (theirs, other) in product(ranks.items(), ranks.items()):
            same_group = all(a == b for axis, (a, b) in enumerate(zip(mine, theirs, strict=True)) if axis not in axes)
            if rank != other and same_group:
                near[rank] += rank // per_node == other // per_node
                far[rank] += rank // per_node != other // per_node
        assert (spread.same_node, spread.other_node) == pytest.approx((sum(near) / world, sum(far) / world))
        assert (spread.most_near, spread.most_far) == (max(near), max(far))


@pytest.mark.parametrize(("world", "per_node", "degrees"), LAYOUTS)
@pytest.mark.parametrize("deduplicate", [True, False])
def test_rows_by_distance_are_the_dispatchers(world, per_node, degrees, deduplicate: bool) -> None:
    """Placement, which counts real runs, is given as many rows for every rank; the mean over all ranks is expected."""
    changes = {"moe": {"dispatcher": {"deduplicate": deduplicate}}}
    config, arithmetic = resolved(world, degrees, changes)
    layout, shares = arithmetic.layout, load_distribution(8, 8, 3, 1.4)
    rows = dispatch_rows(config, layout, place(layout, per_node), 1000.0, shares, "fp32")
    sums = [0.0, 0.0, 0.0]
    block, cut = layout.expert * layout.expert_tensor, layout.expert_tensor
    for rank in range(world):
        first = rank // block * block
        nodes = [other // per_node for other in range(first, first + block)]
        placement = Placement((rank - first) // cut, layout.expert, nodes, (rank - first) % cut, cut)
        for distance, count in enumerate(placement.by_distance([1] * layout.expert)):
            sums[distance] += float(count)
    unit = rows.same_rank
    found = (rows.same_rank, rows.same_node, rows.other_node)
    assert found == pytest.approx([unit * total / world for total in sums])
    pairs = 1000 * 1.4 / layout.expert
    assert rows.undeduplicated == pytest.approx(pairs * (sums[1] + sums[2]) / world)
    assert unit == pytest.approx(pairs) if not deduplicate else unit <= pairs * (1 + 1e-9)


def test_what_does_not_depend_on_the_routing() -> None:
    shares = load_distribution(8, 8, 3, 1.5)
    config, arithmetic = resolved(4, {"expert": 4}, {"moe": {"dispatcher": {"type": "allgather"}}})
    rows = dispatch_rows(config, arithmetic.layout, place(arithmetic.layout, 2), 100.0, shares, "fp32")
    assert (rows.same_rank, rows.same_node, rows.other_node) == (100, 100, 200)
    assert rows.bytes == 300 * (64 * 4 + 8 * 4 + 1)
    padded = {"moe": {"dispatcher": {"pad_to_capacity": True}, "router": {"capacity_factor": 1.2}}}
    config, arithmetic = resolved(4, {"expert": 4}, padded)
    rows = dispatch_rows(config, arithmetic.layout, place(arithmetic.layout, 4), 100.0, shares, "bf16")
    assert rows.same_rank == 2 * 23 and rows.rows == 3 * 2 * 23  # ceil(100 x 1.2 x 1.5 / 8) rows of each expert
    assert rows.bytes == 3 * 2 * 23 * (64 * 2 + 4)
