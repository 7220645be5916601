"""The dispatcher on 1, 2 and 4 ranks against a loop over (token, expert) in float64, and what it really sends."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.distributed.cases import BASE, merged

pytestmark = pytest.mark.distributed

HIDDEN = 10


@dataclass(frozen=True)
class Case:
    """Tokens and experts of a dispatch, and the kind of its routing."""

    kind: str
    tokens: int = 13
    experts: int = 12


@dataclass
class Inputs:
    """One rank's inputs; ``probs`` also has values where the map has none, which must not matter."""

    hidden: torch.Tensor
    probs: torch.Tensor
    routing: torch.Tensor
    cotangent: torch.Tensor


def inputs_of(case: Case, rank: int, world_size: int) -> Inputs:
    generator = torch.Generator().manual_seed(1000 + rank)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    popularity = torch.linspace(0.9, 0.05, case.experts)
    routing = uniform(case.tokens, case.experts) < popularity
    routing[uniform(case.tokens) < 0.2] = False
    if case.kind == "expert_unused":
        routing[:, [0, case.experts // 2]] = False
    elif case.kind == "padding":
        routing[case.tokens - 1 - rank :] = False
    elif case.kind == "all_null" or (case.kind == "all_null_on_rank_0" and rank == 0):
        routing[:] = False
    elif case.kind == "only_last_rank":
        routing[:, : case.experts - case.experts // world_size] = False
    elif case.kind == "full":
        routing[:] = True
    hidden, cotangent = uniform(case.tokens, HIDDEN) - 0.5, uniform(case.tokens, HIDDEN) - 0.5
    return Inputs(hidden, uniform(case.tokens, case.experts) + 0.1, routing, cotangent)


def expert_weights(experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(experts, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)


class Recorder:
    """Wraps all_to_all_single: which tensors really go to other ranks."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls, self.original = rank, [], torch.distributed.all_to_all_single
        self.phase = "forward"

    def __call__(
        self, output: Any, source: Any, receive: Any = None, send: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        world = torch.distributed.get_world_size(group)
        send_sizes = [source.shape[0] // world] * world if send is None else list(send)
        remote = sum(send_sizes) - send_sizes[self.rank]
        kind = "bits" if source.dtype == torch.uint8 else "rows" if source.ndim == 2 else "weights"
        entry_bytes = source[0].numel() * source.element_size() if source.shape[0] else 0
        self.calls.append((self.phase, kind, remote, remote * entry_bytes))
        return self.original(output, source, receive, send, group=group, async_op=async_op)


def dispatch(case: Case, dispatcher: dict[str, Any]) -> dict[str, Any]:
    """One forward and backward of the dispatcher around simple experts, on every rank."""
    from unittest import mock

    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.dispatch import make_dispatcher
    from adamoe_dist.model import transformer_config
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

    launch = Launch.from_environment()
    world, rank = launch.world_size, launch.rank
    capacity = dispatcher.get("capacity")
    keys = {name: value for name, value in dispatcher.items() if name != "capacity"}
    changes = {"moe": {"num_experts": case.experts, "dispatcher": keys}, "parallel": {"expert": world}}
    config = config_from_dict(merged(BASE, changes))
    config.moe.dispatcher.pad_to_capacity = False
    resolved = resolve(config, world)
    config.moe.dispatcher.pad_to_capacity = capacity is not None
    nodes = initialize_groups(launch, resolved)
    try:
        megatron = transformer_config(config, resolved, torch.float32, "sequential")
        local = case.experts // world
        groups = get_default_pg_collection()
        dispatcher = make_dispatcher(config.moe.dispatcher, local, megatron, groups, nodes, lambda _: capacity)
        inputs = inputs_of(case, rank, world)
        weights = expert_weights(case.experts)[rank * local : (rank + 1) * local].clone().requires_grad_()
        hidden, probs = inputs.hidden.clone().requires_grad_(), inputs.probs.clone().requires_grad_()
        recorder = Recorder(rank)
        with mock.patch.object(dist, "all_to_all_single", recorder):
            rows, sent = dispatcher.dispatch_preprocess(hidden.view(1, -1, HIDDEN), inputs.routing, probs)
            rows, sent = dispatcher.token_dispatch(rows, sent)
            rows, counts, sent = dispatcher.dispatch_postprocess(rows, sent)
            expert_of_row = torch.repeat_interleave(torch.arange(local), counts)
            computed = (weights[expert_of_row] @ rows.unsqueeze(-1)).squeeze(-1).tanh() * sent.unsqueeze(-1)
            output = dispatcher.combine_postprocess(
                dispatcher.token_combine(dispatcher.combine_preprocess(computed)),
            )
            recorder.phase = "backward"
            output.view(-1, HIDDEN).backward(inputs.cotangent)
        count = dispatcher.last_count
        return {
            "output": output.detach().view(-1, HIDDEN),
            "shape": tuple(output.shape),
            "hidden": hidden.grad,
            "probs": probs.grad,
            "weights": weights.grad,
            "expert_rows": rows.shape[0],
            "count": tuple(int(value) for value in (count.rows, count.rows_undeduplicated, count.bytes)),
            "by_distance": [int(n) for n in (count.rows_same_rank, count.rows_same_node, count.rows_other_node)],
            "calls": recorder.calls,
        }
    finally:
        destroy_groups()


def kept_pairs(case: Case, inputs: Inputs, capacity: int | None) -> torch.Tensor:
    """The routing map less what is over the capacity of an expert, in token order."""
    kept = inputs.routing.clone()
    for expert in range(case.experts):
        for token in [token for token in range(case.tokens) if kept[token, expert]][capacity:] if capacity else []:
            kept[token, expert] = False
    return kept


def reference(
    case: Case, world: int, capacity: int | None = None
) -> tuple[list[Inputs], list[torch.Tensor], torch.Tensor]:
    """Inputs (with gradients), outputs and the experts' weights (with gradients), by one loop over all pairs."""
    weights = expert_weights(case.experts).requires_grad_()
    everyone = [inputs_of(case, rank, world) for rank in range(world)]
    outputs = []
    loss = weights.sum() * 0
    for inputs in everyone:
        hidden, probs = inputs.hidden.requires_grad_(), inputs.probs.requires_grad_()
        inputs.routing = kept_pairs(case, inputs, capacity)
        rows = []
        for token in range(case.tokens):
            row = hidden[token] * 0
            for expert in range(case.experts):
                if inputs.routing[token, expert]:
                    row = row + probs[token, expert] * torch.tanh(weights[expert] @ hidden[token])
            rows.append(row)
        outputs.append(torch.stack(rows))
        loss = loss + (outputs[-1] * inputs.cotangent).sum() + probs.sum() * 0
    loss.backward()
    return everyone, outputs, weights


KINDS = ["uneven", "expert_unused", "padding", "all_null_on_rank_0", "all_null", "only_last_rank", "full"]


DISPATCHERS = {
    "deduplicated": {},
    "row a pair": {"deduplicate": False},
    "allgather": {"type": "allgather"},
    "padded": {"capacity": 15},
    "padded and dropped": {"capacity": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_a_loop_over_pairs(ranks_of, world, dispatcher, kind):
    case = Case(kind)
    results = ranks_of(world).run(dispatch, case, DISPATCHERS[dispatcher])
    capacity = DISPATCHERS[dispatcher].get("capacity")
    everyone, outputs, weights = reference(case, world, capacity)
    close = {"rtol": 1e-12, "atol": 1e-13}
    for rank, result in enumerate(results):
        assert result["shape"] == (1, case.tokens, HIDDEN)
        if capacity:
            places = case.experts // world * capacity
            assert result["count"][0] == places * (world - 1) and result["expert_rows"] == places * world
        torch.testing.assert_close(result["output"], outputs[rank].detach(), **close)
        torch.testing.assert_close(result["hidden"], everyone[rank].hidden.grad, **close)
        torch.testing.assert_close(result["probs"], everyone[rank].probs.grad, **close)
        unused = ~everyone[rank].routing.any(dim=1)
        assert result["output"][unused].count_nonzero() == 0
    torch.testing.assert_close(torch.cat([result["weights"] for result in results]), weights.grad, **close)


def sent_rows(case: Case, world: int, deduplicate: bool) -> list[list[int]]:
    """``[source][destination]``: hidden vectors, counted token by token."""
    local = case.experts // world
    table = [[0] * world for _ in range(world)]
    for source in range(world):
        for row in inputs_of(case, source, world).routing.tolist():
            for destination in range(world):
                used = sum(row[destination * local : (destination + 1) * local])
                table[source][destination] += min(used, 1) if deduplicate else used
    return table


def remote(table: list[list[int]], rank: int) -> tuple[int, int]:
    """(sent to, received from) other ranks."""
    others = [other for other in range(len(table)) if other != rank]
    return sum(table[rank][other] for other in others), sum(table[other][rank] for other in others)


@pytest.mark.parametrize(
    "case",
    [Case("uneven"), Case("all_null_on_rank_0"), Case("all_null"), Case("only_last_rank"), Case("padding", 7, 40)],
    ids=lambda case: f"{case.kind}-{case.experts}",
)
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_what_is_counted_is_what_is_sent_and_null_slots_send_nothing(ranks_of, world, deduplicate, case):
    results = ranks_of(world).run(dispatch, case, {"deduplicate": deduplicate})
    rows, pairs = sent_rows(case, world, deduplicate), sent_rows(case, world, deduplicate=False)
    local = case.experts // world
    for rank, result in enumerate(results):
        rows_out, rows_in = remote(rows, rank)
        pairs_out, pairs_in = remote(pairs, rank)
        bits = (world - 1) * case.tokens * -(-local // 8)
        row_bytes = HIDDEN * 8
        assert result["count"] == (rows_out, pairs_out, rows_out * row_bytes + pairs_out * 8 + bits)
        assert result["expert_rows"] == sum(pairs[source][rank] for source in range(world))
        forward = [call[1:] for call in result["calls"] if call[0] == "forward"]
        backward = [call[1:] for call in result["calls"] if call[0] == "backward"]
        assert [(kind, size) for kind, _, size in forward] == [
            ("bits", bits),
            ("rows", rows_out * row_bytes),
            ("weights", pairs_out * 8),
            ("rows", rows_in * row_bytes),
        ]
        assert sum(size for _, _, size in forward[:3]) == result["count"][2]
        assert backward[0] == ("rows", rows_out, rows_out * row_bytes)
        assert sorted(backward[1:]) == [
            ("rows", rows_in, rows_in * row_bytes),
            ("weights", pairs_in, pairs_in * 8),
        ]
        if case.kind == "all_null":
            assert result["count"][:2] == (0, 0) and result["expert_rows"] == 0
            assert sum(size for kind, _, size in forward + backward if kind != "bits") == 0


def test_fixed_shapes_are_exchanged_in_equal_parts_without_routing_bits(ranks_of):
    case, capacity = Case("uneven"), 4
    for rank, result in enumerate(ranks_of(2).run(dispatch, case, {"capacity": capacity})):
        rows, row_bytes = case.experts // 2 * capacity, HIDDEN * 8
        away = inputs_of(case, rank, 2).routing[:, 6:] if rank == 0 else inputs_of(case, rank, 2).routing[:, :6]
        assert result["count"] == (rows, int(away.sum()), rows * (row_bytes + 8))
        assert result["by_distance"] == [rows, rows, 0]
        forward = [call[1:] for call in result["calls"] if call[0] == "forward"]
        assert forward == [
            ("rows", rows, rows * row_bytes),
            ("weights", rows, rows * 8),
            ("rows", rows, rows * row_bytes),
        ]


def test_deduplication_saves_rows_but_no_pair(ranks_of):
    with_it, without = (ranks_of(2).run(dispatch, Case("uneven"), {"deduplicate": flag}) for flag in (True, False))
    for ours, plain in zip(with_it, without, strict=True):
        assert ours["count"][0] < plain["count"][0] == plain["count"][1] == ours["count"][1]


def test_one_rank_sends_nothing(ranks_of):
    (result,) = ranks_of(1).run(dispatch, Case("uneven"), {})
    assert result["count"] == (0, 0, 0) and result["calls"] == []
    assert result["expert_rows"] == sent_rows(Case("uneven"), 1, deduplicate=False)[0][0]
