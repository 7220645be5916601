"""The time of a step: what each setting adds, and steps that were measured over limited links."""

import dataclasses
from typing import Any

import pytest

from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.errors import UserError
from adamoe_dist.planning import DEVICES, Assumptions, Cluster, Load, Plan, calibrated, make_plan, spread_of
from adamoe_dist.planning.placement import Shape, Spread
from adamoe_dist.planning.traffic import Links
from tests.distributed.cases import BASE, merged

GPUS = Cluster(nodes=2, gpus_per_node=4, device=DEVICES["h100"])
MODEL = {
    "model": {"num_layers": 4, "hidden_size": 1024, "num_attention_heads": 16, "sequence_length": 1024},
    "moe": {"expert_hidden_size": 512},
    "train": {"global_batch_size": 32, "micro_batch_size": 1},
}


def planned(changes: dict[str, Any] | None = None, cluster: Cluster = GPUS, **assumed: float) -> Plan:
    config = config_from_dict(merged(merged(BASE, MODEL), changes or {}))
    return make_plan(config, cluster, Assumptions.of(cluster.device).changed(assumed), 32000)


def test_one_rank_exchanges_nothing() -> None:
    alone = planned(cluster=Cluster(nodes=1, gpus_per_node=1, device=DEVICES["h100"])).time
    assert alone.total == pytest.approx(alone.dense + alone.experts + alone.update) and alone.hidden == 0


def test_computing_is_flops_over_what_is_reached() -> None:
    plan = planned(activation_moves=0, layer_overhead_us=0, expert_imbalance=1.0, matmul_efficiency=0.5,
                   attention_efficiency=0.5, expert_efficiency=0.5)  # fmt: skip
    norms = 3 * 2 * 1024 * (2 * 4 + 1)  # the only weights of a token's FLOPs that are in no product
    flops = (plan.model_flops - norms) * plan.resolved.tokens_per_step / 8
    assert plan.time.dense + plan.time.experts == pytest.approx(flops / (0.5 * 989e12))
    again = planned({"train": {"recompute": "full"}}, activation_moves=0, layer_overhead_us=0)
    assert again.hardware_flops > again.model_flops == plan.model_flops and again.hfu > again.mfu


def test_the_pipeline_bubble() -> None:
    plan = planned({"parallel": {"pipeline": 4, "expert": 2}})
    time, count = plan.time, plan.resolved.micro_batches_per_rank
    in_micro_batches = time.dense + time.experts + time.dispatch + time.tensor + time.context
    assert count == 16 and time.bubble == pytest.approx(3 * in_micro_batches / count)


def test_zero_reduces_once_a_step_and_in_stage_2_once_a_micro_batch() -> None:
    size = planned({"parallel": {"expert": 1}}).parameters.total
    far = 50e9 * 0.8
    near = 450e9 * 0.75
    once = 4 * size * (3 / 4 / near + 1 / 4 * 1 / 2 / far)
    stages = [planned({"parallel": {"expert": 1}, "zero": {"stage": s}}, latency_us=0).time for s in range(3)]
    assert stages[0].zero == pytest.approx(2 * once)
    assert stages[1].zero == pytest.approx(2 * once + once / 2)  # the weights in bf16
    assert stages[2].zero == pytest.approx(4 * 2 * once + once / 2)
    raw = {"zero": {"stage": 2, "deepspeed": {"zero_optimization": {"overlap_comm": True}}}, "parallel": {"expert": 1}}
    overlapped = planned(raw, latency_us=0).time
    assert overlapped.zero + overlapped.hidden == pytest.approx(stages[2].zero) and overlapped.hidden > 0


def test_only_the_shared_expert_hides_rows() -> None:
    shared = {"moe": {"shared_expert_hidden_size": 4096}, "parallel": {"expert": 8}}
    hidden = planned(shared).time
    open_ = planned(merged(shared, {"moe": {"dispatcher": {"overlap_shared_expert": False}}})).time
    assert hidden.hidden > 0 == open_.hidden and hidden.dispatch + hidden.hidden == pytest.approx(open_.dispatch)
    assert planned({"parallel": {"expert": 8}}).time.hidden == 0


def test_collectives_of_a_group_over_nodes() -> None:
    links = Links(near=100.0, far=10.0, latency_s=0.0)

    def scatter(size: int, *shapes: tuple[int, int, int]) -> float:
        return links.scatter(80, Spread(size, 0, 0, frozenset(Shape(*shape) for shape in shapes)))

    assert scatter(4, (1, 4, 4)) == pytest.approx(80 * 3 / 4 / 100)
    assert scatter(4, (4, 1, 1)) == pytest.approx(80 * 3 / 4 / 10)
    assert scatter(8, (2, 4, 4)) == pytest.approx(80 * 3 / 4 / 100 + 20 / 2 / 10)
    assert scatter(4, (1, 4, 4), (2, 1, 3)) == pytest.approx(80 * 2 / 3 / 100 + 80 / 1 / 2 / 10)
    assert links.exchange(50, 20) == 2.0 and scatter(1, (1, 1, 1)) == 0


def test_messages_keep_the_pace_of_the_slowest_link() -> None:
    """Four stages of three ranks each on machines of six: of three hops one leaves the machine."""
    links = Links(near=100.0, far=10.0, latency_s=0.0)
    assert links.relay(20, spread_of(12, 6, 4, 3), 5) == pytest.approx(2 * 0.2 + 2.0 + 4 * 2.0)
    assert links.relay(20, spread_of(12, 12, 4, 3), 5) == pytest.approx((3 + 4) * 0.2)
    assert links.relay(20, spread_of(12, 6, 1, 12), 5) == 0


@pytest.mark.parametrize(
    ("world", "per_node", "size", "expected_ms"), [(12, 6, 4, 0.82), (40, 8, 5, 1.30), (24, 8, 6, 1.087)]
)
def test_an_exchange_lasts_as_long_as_its_slowest_rank(
    world: int, per_node: int, size: int, expected_ms: float
) -> None:
    """Groups that machines cut unevenly: 64 MB of each rank, rank by rank."""
    links, spread = Links.of(GPUS, Assumptions()), spread_of(world, per_node, size, 1)
    part = 64e6 / size
    slowest = 0.0
    for rank in range(world):
        first = rank // size * size
        others = [other // per_node == rank // per_node for other in range(first, first + size) if other != rank]
        slowest = max(slowest, links.exchange(part * sum(others), part * (len(others) - sum(others))))
    assert 1e3 * slowest == pytest.approx(expected_ms, rel=0.005)
    assert links.exchange(part * spread.most_near, part * spread.most_far) == pytest.approx(slowest)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_dispatch_over_uneven_nodes_waits_for_its_slowest_rank(tensor: int) -> None:
    """Experts over 4 ranks (8 with cut experts) on machines of 6, without latency: there and back, twice."""
    cluster = dataclasses.replace(GPUS, nodes=4, gpus_per_node=6)
    degrees = {"expert": 4, "expert_tensor": tensor, "tensor": tensor}
    changes = {"parallel": degrees, "train": {"global_batch_size": 24}, "moe": {"num_experts": 8}}
    plan = planned(changes, cluster, latency_us=0, expert_imbalance=1.0)
    block, slowest = 4 * tensor, (0, 0)
    for rank in range(24):
        group = range(rank // block * block, (rank // block + 1) * block)
        peers = [other for other in group if other % tensor == rank % tensor and other != rank]
        copies = [other for other in group if other // tensor == rank // tensor and other != rank]
        receivers = [*peers, *(4 * copies)]
        far = sum(other // 6 != rank // 6 for other in receivers)
        slowest = max(slowest, (far, len(receivers) - far))
    far, rows = slowest[0], plan.rows
    both_ways = far * (2 * rows.bytes_to_a_rank + 2 * rows.same_rank * rows.row_bytes) / (50e9 * 0.8)
    layers = plan.parameters.moe_layers * plan.resolved.micro_batches_per_rank
    assert plan.time.dispatch == pytest.approx(layers * both_ways)
    assert rows.other_node < far * rows.same_rank


def test_an_offloaded_optimizer_is_bound_by_the_host() -> None:
    on_device, offloaded = planned({"zero": {"stage": 2}}), planned({"zero": {"stage": 2, "offload_optimizer": True}})
    assert offloaded.time.update > 10 * on_device.time.update
    assert offloaded.memory.total < on_device.memory.total and offloaded.memory.state.host > 0


def two_nodes(variant: str) -> Config:
    """benchmarks/two_nodes.py's models."""
    moe: dict[str, Any] = {"num_null_experts": 8, "top_k": 3}
    if variant != "AdaMoE":
        balance = {"type": "switch", "coefficient": 0.01}
        moe = {"num_null_experts": 0, "top_k": 2, "router": {"type": "topk", "balance": balance}}
    return config_from_dict(
        {
            "model": {
                "num_layers": 2, "hidden_size": 512, "num_attention_heads": 8, "sequence_length": 128,
                "tie_embeddings": True,
            },
            "moe": {"num_experts": 8, "expert_hidden_size": 128, **moe},
            "data": {"tokenizer": "t", "train": [{"path": "x"}]},
            "train": {"global_batch_size": 64, "precision": "fp32"},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "load", "unlimited", "measured"),
    [("AdaMoE", 1.65, 1.60, {0.125: 2.42, 0.025: 5.76}), ("Megatron", 2.0, 1.73, {0.125: 2.88, 0.025: 7.71})],
)
def test_steps_of_two_nodes_over_limited_links(variant, load, unlimited, measured: dict[float, float]) -> None:
    """docs/results.md, "Two nodes over a limited link": computing from the unlimited step, the rest predicted.

    The load of AdaMoE there is that of its rows: 10,864 of 16,384 tokens and layers.
    """
    config, of_token = two_nodes(variant), Load(true_experts_per_token=load)

    def step(rate: float, assumptions: Assumptions) -> Plan:
        device = dataclasses.replace(DEVICES["cpu"], inter_node_gb_s=rate)
        return make_plan(config, Cluster(nodes=2, gpus_per_node=1, device=device), assumptions, 512, of_token)

    free = step(2.0, Assumptions.of(DEVICES["cpu"]))
    assert free.rows.other_node * free.rows_factor == pytest.approx(10864 if variant == "AdaMoE" else 17029, rel=0.04)
    fitted = calibrated(free, unlimited)
    assert step(2.0, fitted).time.total == pytest.approx(unlimited)
    for rate, seconds in measured.items():
        assert step(rate, fitted).time.total == pytest.approx(seconds, rel=0.25)


def test_a_step_shorter_than_its_exchanges_calibrates_nothing() -> None:
    plan = planned({"parallel": {"expert": 8}})
    with pytest.raises(UserError, match="shorter than its exchanges"):
        calibrated(plan, plan.time.dispatch / 2)
