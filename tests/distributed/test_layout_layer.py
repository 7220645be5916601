"""The MoE layer where ranks share sequences, experts or experts' matrices, against one process that has everything.

A rank's tokens are its own in every layout (sequence parallelism), so the reference runs each rank's tokens in turn and
adds the gradients up.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cases import merged
from tests.distributed.layout_layers import (
    SHARED_WIDTH,
    Variant,
    layer_in,
    run_alone,
    run_variants,
    shared_columns,
)
from tests.distributed.layouts import Layout, close_groups, open_groups
from tests.distributed.test_dispatch_layer import Events, HostReads
from tests.model.layers import PLAIN, hidden_states

pytestmark = pytest.mark.distributed

SHARED = {"shared_expert_hidden_size": SHARED_WIDTH}
NULLS = {"null_types": {"identity": 2, "constant": 2}}
VARIANTS = {
    name: Variant(moe, gate)
    for name, moe, gate in [
        ("deduplicated", {}, False),
        ("row a pair", {"dispatcher": {"deduplicate": False}}, False),
        ("rows in bf16", {"dispatcher": {"dtype": "bf16"}}, False),
        ("shared", SHARED, False),
        ("shared, gate", SHARED, True),
        ("shared, not overlapped", merged(SHARED, {"dispatcher": {"overlap_shared_expert": False}}), True),
        ("null experts with output", NULLS, False),
        ("capacity", {"router": {"capacity_factor": 0.5}}, False),
        ("capacity by position", {"router": {"capacity_factor": 0.5, "drop_policy": "position"}}, False),
        ("baseline", merged(PLAIN, {"router": {"type": "topk"}}), False),
        ("baseline, shared", merged(merged(PLAIN, {"router": {"type": "topk"}}), SHARED), True),
    ]
}
LAYOUTS = [
    Layout(expert_tensor=2),
    Layout(tensor=2, expert=2),
    Layout(tensor=2, expert_tensor=2),
    Layout(expert=2, expert_tensor=2),
    Layout(tensor=2, expert=2, expert_tensor=2),
]
NODES = {2: (0, 1), 4: (0, 1, 1, 0)}

Computed = Callable[[Layout], list[dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def computed(ranks_of) -> Computed:
    """All variants of a layout, by rank; run when first asked for."""
    results: dict[Layout, Any] = {}

    def get(layout: Layout) -> Any:
        if layout not in results:
            results[layout] = None  # once only, also where it fails
            results[layout] = ranks_of(layout.ranks).run(run_variants, layout, VARIANTS, NODES[layout.ranks])
        assert results[layout] is not None, f"{layout} did not run"
        return results[layout]

    return get


@pytest.fixture(scope="module")
def alone(ranks_of) -> Callable[[int], dict[str, dict[str, Any]]]:
    """All variants on one process, over the tokens of so many ranks."""
    results: dict[int, Any] = {}

    def get(ranks: int) -> Any:
        if ranks not in results:
            (results[ranks],) = ranks_of(1).run(run_alone, VARIANTS, ranks)
        return results[ranks]

    return get


def held(layout: Layout, rank: int, name: str, full: torch.Tensor) -> torch.Tensor:
    """Of a gradient over all ranks' tokens, what is of one rank's parameter."""
    if name.startswith("experts."):
        place, part = divmod(rank, layout.expert_tensor)
        width = full.shape[-1 if name.endswith("weight2") else 1] // (1 if name.endswith("weight2") else 2)
        slice_width = width // layout.expert_tensor
        inner = list(range(part * slice_width, (part + 1) * slice_width))
        mine = full.chunk(layout.expert)[place]
        return mine[:, :, inner] if name.endswith("weight2") else mine[:, inner + [width + index for index in inner]]
    if name.startswith("shared_experts.linear"):
        inner = shared_columns(rank % layout.tensor, layout.tensor)
        return full[:, inner] if "fc2" in name else full[inner + [SHARED_WIDTH + index for index in inner]]
    return full


def over_ranks(layout: Layout, name: str, gradients: list[torch.Tensor], rank: int) -> torch.Tensor:
    """A parameter's gradients added over the ranks that hold the same of it and saw other tokens."""
    if name.startswith("experts."):
        return gradients[rank]
    if name.startswith("shared_experts.linear"):
        return torch.stack(gradients[rank % layout.tensor :: layout.tensor]).sum(dim=0)
    return torch.stack(gradients).sum(dim=0)


def assert_equal(ours: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")


def assert_near(ours: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Rounding to bf16 changes a number by up to 0.4 %."""
    error = float((ours - wanted).norm() / wanted.norm())
    assert error < 0.02, f"{name}: off by {error} of its norm"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_gradients_are_those_of_one_process(computed, alone, layout, variant):
    results = [result[variant] for result in computed(layout)]
    wanted = alone(layout.ranks)[variant]
    compare = assert_near if variant == "rows in bf16" else assert_equal
    overlapping = variant in ("shared", "shared, gate")
    for rank, result in enumerate(results):
        assert result["overlaps"] == overlapping
        for name in ("output", "input"):
            compare(result[name], wanted["passes"][rank][name], name)
        assert result["gradients"].keys() == wanted["gradients"].keys()
        for name, full in wanted["gradients"].items():
            assert float(full.abs().max()) > 1e-3, f"{name} shows nothing"
            everyones = [other["gradients"][name] for other in results]
            compare(over_ranks(layout, name, everyones, rank), held(layout, rank, name, full), name)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.tensor > 1], ids=str)
def test_what_tensor_ranks_hold_alike_is_marked_to_be_summed(computed, layout):
    """Each has the gradient of its own part of the sequence."""
    for variant, result in computed(layout)[0].items():
        alike = [name for name in result["gradients"] if not name.startswith(("experts.", "shared_experts.linear"))]
        assert result["summed_over_tensor"] == sorted(alike), variant
        assert ("shared_experts.gate_weight" in alike) == VARIANTS[variant].gate
        assert ("null_experts.constant" in alike) == (variant == "null experts with output")


def counted_by_hand(layout: Layout, routing: torch.Tensor, rank: int, a_pair: bool) -> dict[str, int]:
    """Follow each row of a rank's tokens to a rank of each expert that it needs, and from there to its tensor group."""
    nodes, cut = NODES[layout.ranks], layout.expert_tensor
    counts = {"same_rank": 0, "same_node": 0, "other_node": 0}

    def move(source: int, destination: int, rows: int) -> None:
        same_node = nodes[source] == nodes[destination]
        counts["same_rank" if source == destination else "same_node" if same_node else "other_node"] += rows

    local = routing.shape[1] // layout.expert
    for row in routing.tolist():
        for place in range(layout.expert):
            used = sum(row[place * local : (place + 1) * local])
            rows = used if a_pair else min(used, 1)
            landing = place * cut + rank % cut
            move(rank, landing, rows)
            for copy in range(place * cut, (place + 1) * cut):
                if copy != landing:
                    move(landing, copy, rows)
    return counts


def bytes_by_hand(layout: Layout, routing: torch.Tensor, rank: int, variant: str) -> dict[str, int]:
    """Rows, their weights, and a bit for each token and expert: as many bytes as a row to every rank would be rows."""
    rows = counted_by_hand(layout, routing, rank, a_pair=variant in ("row a pair", "baseline"))
    pairs = counted_by_hand(layout, routing, rank, a_pair=True)
    everywhere = counted_by_hand(layout, torch.ones_like(routing), rank, a_pair=False)
    row_bytes = 64 * (2 if variant == "rows in bf16" else 4)
    bits = 0 if variant == "baseline" else -(-(routing.shape[1] // layout.expert) // 8)
    return {name: rows[name] * row_bytes + 4 * pairs[name] + bits * everywhere[name] for name in rows}


@pytest.mark.parametrize("variant", ["deduplicated", "row a pair", "rows in bf16", "capacity", "baseline"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_are_counted_exactly_and_by_distance(computed, layout, variant):
    results = [result[variant] for result in computed(layout)]
    a_pair = variant in ("row a pair", "baseline")
    pairs = 0
    for rank, result in enumerate(results):
        wanted = counted_by_hand(layout, result["map"], rank, a_pair)
        sums = result["sums"]
        assert {name: sums[f"dispatch_rows_{name}"] for name in wanted} == wanted
        sent = bytes_by_hand(layout, result["map"], rank, variant)
        for name in ("same_node", "other_node"):
            assert sums[f"dispatch_bytes_{name}"] == sent[name], name
        plain = counted_by_hand(layout, result["map"], rank, a_pair=True)
        pairs += plain["same_node"] + plain["other_node"]
        assert sums["dispatch_rows_undeduplicated"] == plain["same_node"] + plain["other_node"]
        place, local = rank // layout.expert_tensor, result["map"].shape[1] // layout.expert
        mine = slice(place * local, (place + 1) * local)
        assert result["expert_rows"] == sum(int(other["map"][:, mine].sum()) for other in results)
    if variant == "baseline":  # Megatron's own exchange
        return
    rows = sum(result["sums"]["dispatch_rows"] for result in results)
    assert rows > 0
    sent = {kind: sum(result["entries"][kind] for result in results) for kind in ("rows", "weights")}
    assert sent == {"rows": 4 * rows, "weights": 2 * pairs}  # there and back, forward and backward
    moved = {kind: sum(result["bytes"][kind] for result in results) for kind in ("rows", "weights", "bits")}
    assert sum(result["sums"]["dispatch_bytes"] for result in results) == (
        moved["rows"] / 4 + moved["weights"] / 2 + moved["bits"]
    )


def initial_experts(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    open_groups(layout)
    try:
        experts = layer_in(layout, Variant()).experts
        for parameter, axis in ((experts.weight1, 1), (experts.weight2, 2)):
            assert parameter.is_expert and parameter.tensor_model_parallel and parameter.expert_tensor_axis == axis
        return experts.weight1.detach().clone(), experts.weight2.detach().clone()
    finally:
        close_groups()


@pytest.mark.parametrize("layout", [Layout(expert_tensor=2), Layout(expert=2, expert_tensor=2)], ids=str)
def test_initial_weights_do_not_depend_on_how_experts_are_cut(ranks_of, layout):
    (whole,) = ranks_of(1).run(initial_experts, Layout())
    for rank, parts in enumerate(ranks_of(layout.ranks).run(initial_experts, layout)):
        for number, (part, full) in enumerate(zip(parts, whole, strict=True), start=1):
            assert torch.equal(part, held(layout, rank, f"experts.weight{number}", full))


def watched(layout: Layout) -> tuple[list[str], list[str], list[str]]:
    """The order of exchanges and shared expert, and what was read on the host, forward and backward."""
    from adamoe_dist.experts import KERNELS

    open_groups(layout)
    try:
        rank = torch.distributed.get_rank()
        layer, events = layer_in(layout, Variant(SHARED)), Events()
        with events.watch(layer):
            output = layer(hidden_states(rank).requires_grad_())[0]
            events.seen.append("backward")
            output.sum().backward()
        layer = layer_in(layout, Variant())
        layer.experts.kernel = KERNELS["grouped_mm"]
        layer(hidden_states(rank))
        forward, backward = HostReads(), HostReads()
        with forward:
            output = layer(hidden_states(rank).requires_grad_())[0]
        with backward:
            output.sum().backward()
        return events.seen, forward.seen, backward.seen
    finally:
        close_groups()


@pytest.mark.parametrize("layout", [Layout(expert_tensor=2), Layout(expert=2, expert_tensor=2)], ids=str)
def test_one_host_copy_and_the_shared_expert_overlaps_the_first_exchange(ranks_of, layout):
    more = ["start", "wait"] * (1 if layout.expert == 1 else 3)
    wanted = ["start", "shared", "wait", *more, "backward", *more, "start", "shared", "wait"]
    for events, forward, backward in ranks_of(layout.ranks).run(watched, layout):
        assert events == wanted
        assert forward == ["tolist"] and backward == []
