"""The search over layouts, what it holds, and the sweep."""

import dataclasses
from typing import Any

import pytest

from adamoe_dist.config import Config, config_from_dict, overridden_keys, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.planning import (
    DEVICES,
    Assumptions,
    Cluster,
    Load,
    Space,
    baseline,
    make_plan,
    nodes_of,
    search,
    search_table,
    sweep,
    sweep_table,
)
from tests.distributed.cases import BASE, merged

BIG = {
    "model": {
        "num_layers": 8,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 2,
        "sequence_length": 2048,
    },
    "moe": {"num_experts": 16, "num_null_experts": 16, "top_k": 4, "expert_hidden_size": 2048},
    "train": {"global_batch_size": 64, "micro_batch_size": "auto"},
}
CLUSTER = Cluster(nodes=2, gpus_per_node=4, device=DEVICES["h100"])


def big(changes: dict[str, Any] | None = None) -> Config:
    return config_from_dict(merged(merged(BASE, BIG), changes or {}))


def with_memory(gib: float) -> Cluster:
    return dataclasses.replace(CLUSTER, device=dataclasses.replace(DEVICES["h100"], memory_gib=gib))


def test_the_search_ranks_what_fits_and_counts_what_is_refused() -> None:
    found = search(big(), with_memory(30), Assumptions(), 32000)
    speeds = [plan.tokens_per_second for plan in found.fitting]
    assert speeds == sorted(speeds, reverse=True) and all(plan.fits for plan in found.fitting)
    assert found.planned > len(found.fitting) > 20
    assert any("parallel.tensor=4 does not divide" in reason for reason in found.refused)
    best = found.best()
    assert make_plan(best.config, best.cluster, Assumptions(), 32000).time == best.time
    for plan in found.fitting[:50]:
        assert plan.resolved == resolve(plan.config, 8)
    offered = {(plan.resolved.layout, plan.config.zero.stage) for plan in found.fitting}
    assert len({layout for layout, _ in offered}) > 5


def test_what_is_given_is_never_faster_than_what_is_found() -> None:
    given = make_plan(big({"parallel": {"expert": 8}}), CLUSTER, Assumptions(), 32000)
    assert given.fits
    assert search(big(), CLUSTER, Assumptions(), 32000).best().tokens_per_second >= given.tokens_per_second


def test_a_model_that_fits_nowhere_says_by_how_much() -> None:
    found = search(big(), with_memory(4), Assumptions(), 32000)
    assert found.smallest is not None and not found.fitting
    missing = found.smallest.memory_gib - 4 * 0.95
    with pytest.raises(UserError, match=rf"{missing:.1f} GiB too much") as refusal:
        found.best()
    assert "--nodes 2 --gpus-per-node 4 --gpu h100" in str(refusal.value) and "\n" not in str(refusal.value)


def held(config: Config, *overrides: str) -> Space:
    return Space.holding(config, overridden_keys(overrides))


def test_what_is_held_stays_and_the_rest_is_searched() -> None:
    overrides = ["parallel.tensor=2", "train.micro_batch_size=2", "train.recompute=full", "zero={stage: 2}"]
    config = big({"parallel": {"tensor": 2, "pipeline": 2}, "zero": {"stage": 2},
                  "train": {"micro_batch_size": 2, "recompute": "full"}})  # fmt: skip
    found = search(config, CLUSTER, Assumptions(), 32000, space=held(config, *overrides))
    for plan in found.fitting:
        assert plan.resolved.layout.tensor == 2 and plan.resolved.micro_batch_size == 2
        assert plan.config.train.recompute == "full" and plan.config.zero.stage == 2
    assert {plan.resolved.layout.pipeline for plan in found.fitting} == {1, 2, 4}  # of the file, so free
    table = "\n".join(search_table(found, 1))
    assert "held by the command line: parallel.tensor=2, zero.stage=2, train.recompute=full, " in table
    assert "context up to 8" in table and "ZeRO 0 to 3" not in table and "tensor up to" not in table.split("tried:")[1]


def test_offloading_and_stages_as_held() -> None:
    config = big({"zero": {"stage": 1, "offload_optimizer": True}})
    for overrides, expected in (
        (["zero.offload_optimizer=true"], {(1, True), (2, True), (3, True)}),
        (["zero.offload_optimizer=true", "zero.stage=1"], {(1, True)}),
        ([], {(0, False), (1, False)}),
    ):
        found = search(config, CLUSTER, Assumptions(), 32000, space=held(config, *overrides))
        stages = {(plan.config.zero.stage, plan.config.zero.offload_optimizer) for plan in found.fitting}
        assert stages <= expected | {(2, True), (2, False), (3, False)} if not overrides else stages <= expected
        assert stages and (overrides or expected <= stages)


def test_a_held_key_that_no_layout_can_have_is_named() -> None:
    for changes, override in (
        ({"parallel": {"tensor": 3}}, "parallel.tensor=3"),
        ({"train": {"micro_batch_size": 7}}, "train.micro_batch_size=7"),
        ({"parallel": {"expert": 5}}, "parallel.expert=5"),
    ):
        config = big(changes)
        with pytest.raises(UserError, match=override):
            search(config, CLUSTER, Assumptions(), 32000, space=held(config, override)).best()


def test_stage_3_is_marked_and_auto_holds_nothing() -> None:
    config = big({"zero": {"stage": 3}})
    found = search(config, CLUSTER, Assumptions(), 32000, space=held(config, "zero.stage=3", "parallel.expert=auto"))
    assert found.space.held == {"zero.stage"}
    assert "ZeRO-3 (experimental)" in search_table(found, 1)[2]
    assert len({plan.resolved.layout.expert for plan in found.fitting}) > 1


def test_the_baseline_is_a_valid_configuration() -> None:
    config = baseline(big({"moe": {"router": {"target_load": 1.5}, "null_types": {"identity": 2}}}), 2)
    assert config.moe.expected_load == 2 and resolve(config, 8).layout.expert == 8


def test_the_sweep_compares_at_equal_load() -> None:
    config = big({"moe": {"num_null_experts": 48}})  # 1.0 true experts a token
    points = list(sweep(config, CLUSTER, Assumptions(), 32000, Load(true_experts_per_token=1.4), counts=[1, 2500]))
    assert nodes_of(CLUSTER)[:3] == [1, 2, 4] and nodes_of(CLUSTER)[-1] * 4 == 10_000 and len(points) == 6
    ours, equal, theirs = points[-3:]
    assert [p.model for p in points[-3:]] == ["AdaMoE, load 1.4", "AdaMoE, load 1", "Megatron top-1"]
    assert ours.plan and equal.plan and theirs.plan
    assert equal.plan.load.true_experts_per_token == theirs.plan.load.true_experts_per_token == 1
    assert ours.plan.resolved.world_size == 10_000
    tokens = ours.plan.resolved.tokens_per_step
    assert tokens == theirs.plan.resolved.tokens_per_step == 10_000 * 8 * 2048
    first, *_ = [row for row in sweep_table(points) if row.startswith("| 10000 ")]
    assert first.split("|")[2].strip() == f"{tokens:,}"


def test_a_sweep_in_which_nothing_fits_is_refused() -> None:
    points = list(sweep(big(), with_memory(2.5), Assumptions(), 32000, Load(true_experts_per_token=2.0), counts=[1]))
    with pytest.raises(UserError, match="--sweep: no model fits"):
        sweep_table(points)
