"""The layer around the dispatchers: overlap, row type, host copies, memory, distances, and the flex dispatcher."""

import os
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.cases import merged
from tests.model.layers import PLAIN, config_of, hidden_states, layer_of, run_layer

pytestmark = pytest.mark.distributed

SHARED = {"shared_expert_hidden_size": 24}


def in_groups(check: Any, *arguments: Any) -> Any:
    """Run ``check(rank, nodes, *arguments)`` on this rank, the experts spread over all ranks of one machine."""
    return on_nodes([0] * world_size(), check, *arguments)


def on_nodes(nodes: list[int], check: Any, *arguments: Any) -> Any:
    """The same on faked machines: rank r is on ``nodes[r]``, as DeepSpeed's launcher would tell it."""
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

    rank = int(os.environ["RANK"])
    with mock.patch.dict(os.environ, CROSS_RANK=str(nodes[rank])):
        launch = Launch.from_environment()
    degrees = {"parallel": {"expert": launch.world_size}}
    gathered = initialize_groups(launch, config_of(degrees, launch.world_size)[1])
    try:
        return check(rank, gathered, *arguments)
    finally:
        destroy_groups()


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


class Events:
    """The order of exchanges, waits and the shared expert, forward and backward."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watch(self, layer: Any) -> Any:
        import torch.distributed as dist

        original = dist.all_to_all_single

        def exchange(output: Any, source: Any, *arguments: Any, async_op: bool = False, **keywords: Any) -> Any:
            work = original(output, source, *arguments, async_op=async_op, **keywords)
            if source.ndim != 2 or source.dtype == torch.uint8:
                return work
            self.seen.append("start")
            return Waited(work, self.seen)

        layer.shared_experts.register_forward_hook(lambda *_: self.seen.append("shared"))
        layer.shared_experts.linear_fc1.weight.register_hook(lambda _: self.seen.append("shared"))
        return mock.patch.object(dist, "all_to_all_single", exchange)


class Waited:
    def __init__(self, work: Any, seen: list[str]) -> None:
        self.work, self.seen = work, seen

    def wait(self) -> None:
        self.seen.append("wait")
        self.work.wait()


def overlap(rank: int, _: Any, dispatcher: dict[str, Any], overlapped: bool, recompute: bool) -> dict[str, Any]:
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import random

    moe = merged(SHARED, {"dispatcher": {**dispatcher, "overlap_shared_expert": overlapped}})
    layer = layer_of({"moe": moe}, world_size())
    assert layer.overlaps_shared_expert == (overlapped and world_size() > 1)
    layer.train()
    events = Events()
    hidden = hidden_states(rank).requires_grad_()
    no_device = {"_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(), "_set_cuda_rng_state": mock.Mock()}
    with events.watch(layer), mock.patch.multiple(random, **no_device):
        if recompute:
            output = tensor_parallel.checkpoint(lambda x: layer(x)[0], False, hidden)
        else:
            output = layer(hidden)[0]
        events.seen.append("backward")
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(60 + rank)))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert layer._shared_input is None and layer._shared_output is None
    return {"events": events.seen, "output": output.detach(), "input": hidden.grad, **gradients}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dispatcher", [{}, {"deduplicate": False}, {"type": "allgather"}])
def test_the_overlapped_shared_expert_gives_the_same_numbers(ranks_of, dispatcher, recompute):
    ranks = ranks_of(2)
    together = ranks.run(in_groups, overlap, dispatcher, True, recompute)
    apart = ranks.run(in_groups, overlap, dispatcher, False, recompute)
    for ours, plain in zip(together, apart, strict=True):
        assert ours.keys() == plain.keys()
        for name in ours.keys() - {"events"}:
            if name == "input":  # three gradients are summed, in another order
                torch.testing.assert_close(ours[name], plain[name], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(ours[name], plain[name]), name


def test_the_shared_expert_runs_while_rows_travel_both_ways(ranks_of):
    forward = ["start", "shared", "wait", "start", "wait"]
    backward = ["start", "wait", "start", "shared", "wait"]
    for recompute in (False, True):
        for result in ranks_of(2).run(in_groups, overlap, {}, True, recompute):
            again = forward if recompute else []
            assert result["events"] == [*forward, "backward", *again, *backward]
    for result in ranks_of(2).run(in_groups, overlap, {}, False, False):
        assert result["events"] == ["shared", *forward[:1], *forward[2:], "backward", *["start", "wait"] * 2, "shared"]


def rounded(rank: int, _: Any, keys: dict[str, Any], rounding: bool) -> dict[str, Any]:
    """The layer with rows in bf16, or with the same rows rounded before and after an exchange in fp32."""
    from adamoe_dist.dispatch import exchange as room

    layer = layer_of({"moe": {"dispatcher": {} if rounding else keys}}, world_size())
    layer.train()
    sent = []

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Any) -> Any:
            return rows.bfloat16().float()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient.bfloat16().float()

    original = room.exchange

    def exchange(*travellers: Any, **keywords: Any) -> Any:
        (rows, transport), *others = travellers
        if not rounding:
            sent.append(keywords["dtype"])
            return original(*travellers, **keywords)
        return original((Rounded.apply(rows), transport), *others, **keywords)

    with mock.patch("adamoe_dist.dispatch.alltoall.exchange", exchange):
        result = run_layer(layer, rank)
    assert rounding or sent == [torch.bfloat16] * 2
    count = layer.token_dispatcher.last_count
    return {**result, "count": (count.rows, count.rows_undeduplicated, count.bytes)}


def test_rows_in_bf16_are_rounded_on_the_way_and_nowhere_else(ranks_of):
    ours = ranks_of(2).run(in_groups, rounded, {"dtype": "bf16"}, False)
    wanted = ranks_of(2).run(in_groups, rounded, {}, True)
    plain = ranks_of(2).run(in_groups, rounded, {"dtype": "model"}, True)
    full = ranks_of(2).run(in_groups, plain_layer)
    for result, same, exact in zip(ours, wanted, full, strict=True):
        for name in result.keys() - {"count"}:
            assert torch.equal(result[name], same[name]), name
        assert not torch.equal(result["output"], exact["output"])
        rows, pairs, sent = result["count"]
        assert sent == rows * 64 * 2 + pairs * 4 + 48 and same["count"][2] == rows * 64 * 4 + pairs * 4 + 48
    assert torch.equal(plain[0]["output"], wanted[0]["output"])


def plain_layer(rank: int, _: Any) -> dict[str, Any]:
    layer = layer_of({}, world_size())
    layer.train()
    return run_layer(layer, rank)


class HostReads(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for a device: values read, and shapes that depend on values."""

    READS = ("tolist", "item", "nonzero", "masked_select", "__bool__", "__int__", "__float__", "__index__", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        by_mask = name == "__getitem__" and torch.is_tensor(args[1]) and args[1].dtype in (torch.bool, torch.uint8)
        by_tensor = name == "repeat_interleave" and "output_size" not in (kwargs or {})
        from_host = name in ("tensor", "as_tensor") and not torch.is_tensor(args[0])
        if name in self.READS or by_mask or by_tensor or from_host or name in ("unique", "bincount"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def host_reads(rank: int, _: Any, moe: dict[str, Any], padded: bool = False) -> tuple[list[str], list[str]]:
    layer = layer_of({"moe": merged(moe, {"experts": {"kernel": "grouped_mm"}})}, world_size())
    if padded:
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        from adamoe_dist.dispatch import DispatcherSlot, PaddedDispatcher

        slot = DispatcherSlot(layer.num_local_experts, layer.config, get_default_pg_collection())
        layer.token_dispatcher = PaddedDispatcher(slot, lambda tokens: tokens // 2)
    layer.train()
    layer(hidden_states(rank))  # constants are made once
    forward, backward = HostReads(), HostReads()
    with forward:
        output = layer(hidden_states(rank).requires_grad_())[0]
    with backward:
        output.sum().backward()
    return forward.seen, backward.seen


@pytest.mark.parametrize("dispatcher", [{}, {"deduplicate": False}, {"type": "allgather"}])
@pytest.mark.parametrize("world", [1, 2])
def test_one_copy_to_the_host_a_layer(ranks_of, world, dispatcher):
    for forward, backward in ranks_of(world).run(in_groups, host_reads, {"dispatcher": dispatcher}):
        assert forward == ["tolist"] and backward == []


def test_fixed_shapes_need_no_copy(ranks_of):
    for forward, backward in ranks_of(2).run(in_groups, host_reads, {}, True):
        assert forward == [] and backward == []


def saved_rows(rank: int, _: Any, all_null: bool, kernel: str) -> tuple[int, int, int]:
    """Bytes of distinct saved tensors with hidden-sized rows beside weights, and the pairs that this rank computed."""
    layer = layer_of({"moe": {"experts": {"kernel": kernel}}}, world_size())
    layer.train()
    hidden = hidden_states(rank).requires_grad_()
    with torch.no_grad():
        probs, routing = layer.route(hidden)
    if all_null:
        probs, routing = torch.zeros_like(probs), torch.zeros_like(routing)
    probs = probs.requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.ndim >= 1 and 64 in tensor.shape and storage.data_ptr() not in weights and storage.nbytes():
            kept[storage.data_ptr()] = storage
        return tensor

    pairs = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: pairs.append(arguments[0].shape[0]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows, sent = layer.dispatch(*layer.preprocess(hidden, probs, routing))
        output, _ = layer.routed_experts_compute(rows, sent)
        output = layer.postprocess(layer.combine(output), None)
    output.sum().backward()
    return sum(storage.nbytes() for storage in kept.values()), pairs[0], hidden[..., 0].numel()


@pytest.mark.parametrize("kernel", ["grouped_mm", "sequential"])
@pytest.mark.parametrize("world", [1, 2])
def test_no_more_is_kept_than_the_rows_that_exist(ranks_of, world, kernel):
    row_bytes = 64 * 4
    for kept, pairs, tokens in ranks_of(world).run(in_groups, saved_rows, False, kernel):
        assert 0 < pairs < 3 * tokens and kept == pairs * row_bytes
    for kept, pairs, _ in ranks_of(world).run(in_groups, saved_rows, True, kernel):
        assert pairs == 0 and kept <= (96 + 48) * row_bytes  # one zero matrix of each product, whatever the tokens


def distances(rank: int, nodes: tuple[int, ...], moe: dict[str, Any]) -> dict[str, Any]:
    from adamoe_dist.model import AdaMoELayer, transformer_config
    from tests.distributed.cases import counted

    config, resolved = config_of({"moe": moe, "parallel": {"expert": world_size()}}, world_size())
    layer = AdaMoELayer(transformer_config(config, resolved, torch.float32, "sequential", nodes), layer_number=1)
    layer.set_layer_number(1)
    layer.train()
    maps = []
    layer.router.register_forward_hook(lambda _, __, outputs: maps.append(outputs[1]))
    layer(hidden_states(rank))
    return {"map": maps[0].clone(), "sums": counted(layer)[0], "nodes": nodes}


BASELINE = merged(PLAIN, {"router": {"type": "topk"}})
KINDS = {
    "deduplicated": ({}, "rows"),
    "row a pair": ({"dispatcher": {"deduplicate": False}}, "pairs"),
    "allgather": ({"dispatcher": {"type": "allgather"}}, "tokens"),
    "baseline": (BASELINE, "pairs"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_counted_by_the_distance_that_the_launcher_tells(ranks_of, kind):
    moe, unit = KINDS[kind]
    nodes = [0, 1, 1, 0]
    for rank, result in enumerate(ranks_of(4).run(on_nodes, nodes, distances, moe)):
        assert result["nodes"] == tuple(nodes)
        wanted = {"same_rank": 0, "same_node": 0, "other_node": 0}
        for row in result["map"].tolist():
            for other in range(4):
                used = sum(row[2 * other : 2 * other + 2])
                count = {"rows": min(used, 1), "pairs": used, "tokens": 1}[unit]
                place = "same_rank" if other == rank else "same_node" if nodes[other] == nodes[rank] else "other_node"
                wanted[place] += count
        sums = result["sums"]
        assert {name: sums[f"dispatch_rows_{name}"] for name in wanted} == wanted and wanted["other_node"] > 0
        assert sums["dispatch_rows"] == wanted["same_node"] + wanted["other_node"]
