"""The search over layouts, the sweep, and the files that a plan becomes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adamoe_dist.config import Config, config_from_dict, load_config, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.planning import (
    DEVICES,
    Assumptions,
    Cluster,
    Load,
    baseline,
    make_plan,
    nodes_of,
    search,
    sweep,
    write_config,
    write_slurm,
)
from tests.distributed.cases import BASE, merged

TEMPLATE = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
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


def test_a_written_configuration_plans_the_same(tmp_path: Path) -> None:
    plan = search(big(), CLUSTER, Assumptions(), 32000).best()
    write_config(plan, tmp_path / "planned.yaml", overwrite=False)
    again = make_plan(load_config(tmp_path / "planned.yaml"), CLUSTER, Assumptions(), 32000)
    assert again.time == plan.time and again.memory == plan.memory
    with pytest.raises(UserError, match="--overwrite"):
        write_config(plan, tmp_path / "planned.yaml", overwrite=False)
    write_slurm(plan, Path("planned.yaml"), TEMPLATE, tmp_path / "job", overwrite=False)
    changed = set((tmp_path / "job").read_text().splitlines()) - set(TEMPLATE.read_text().splitlines())
    assert changed == {
        "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "config=${CONFIG:-planned.yaml}"
    }  # fmt: skip
