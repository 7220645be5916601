"""Time by phase: what sleeps is found where it sleeps, on every kind of rank, and measuring changes no number."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import merged
from tests.distributed.timing_checks import SLEEP_S, STEPS, run_timed
from tests.end_to_end.conftest import LAYER_PARTS, PHASES

pytestmark = pytest.mark.distributed

EVERY_STEP = {"monitor": {"log_interval": 1}}
SHARED = {"shared_expert_hidden_size": 24, "dispatcher": {"overlap_shared_expert": True}}
BASELINE = {"num_null_experts": 0, "top_k": 2, "router": {"type": "topk", "balance": {"type": "switch"}}}
STAGES = {"parallel": {"pipeline": 2, "expert": 1}, "model": {"num_layers": 4}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "expert parallel, shared expert while rows travel": {"parallel": {"expert": 2}, "moe": SHARED},
    "two stages, recomputed": merged(STAGES, {"train": {"recompute": "full"}}),
    "Megatron's router and dispatcher": {
        "parallel": {"expert": 2},
        "moe": BASELINE,
        "train": {"recompute": "selective"},
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_phase_has_the_time_that_it_takes(ranks_of, tmp_path: Path, name: str) -> None:
    ranks = ranks_of(2).run(run_timed, merged(EVERY_STEP, LAYOUTS[name]), str(tmp_path), True)
    mine = ranks[0]
    is_recomputed = name == "two stages, recomputed"
    each_s = SLEEP_S * mine["layers"] * mine["micro_batches"]  # of a kind of module, in a step's forward passes
    assert set(mine["records"]) == set(range(1, STEPS + 1))
    assert not any(field.startswith("time_") or "flops_per" in field for field in mine["records"][1]), "the first step"
    for step in range(2, STEPS + 1):
        record = mine["records"][step]
        times = {part: record[f"time_{part}_s"] for part in (*PHASES, *LAYER_PARTS) if f"time_{part}_s" in record}
        for part, mean in times.items():
            assert all(rank["records"][step][f"time_{part}_s"] == mean for rank in ranks), "reduced over ranks"
        assert ("pipeline" in times) == ("two stages" in name)
        step_s = statistics.fmean(rank["seconds"][step] for rank in ranks)
        assert sum(times[phase] for phase in PHASES if phase in times) == pytest.approx(step_s, rel=1e-6)
        assert min(times.values()) >= 0
        assert sum(times[part] for part in LAYER_PARTS) <= times["forward"], "what is computed again is backward"
        assert times["data"] >= SLEEP_S and times["optimizer"] >= SLEEP_S
        assert times["routing"] >= each_s and times["experts"] >= each_s
        assert times["backward"] >= 2 * each_s * is_recomputed
        if "shared expert" in name:
            rest_s = times["forward"] - sum(times[part] for part in LAYER_PARTS)
            assert rest_s >= each_s, "what is computed meanwhile is not dispatch"
        assert record["model_flops_per_second"] > 0 and "mfu" not in record


def test_measuring_and_profiling_change_no_number(ranks_of, tmp_path: Path) -> None:
    layout = LAYOUTS["expert parallel, shared expert while rows travel"]
    seldom = {"monitor": {"log_interval": 100}}
    traced = {"monitor": {"profile": {"steps": [2, 3], "ranks": [1]}}}
    plain, timed, profiled = (
        ranks_of(2).run(run_timed, merged(layout, changes), str(tmp_path / str(number)))
        for number, changes in enumerate((seldom, EVERY_STEP, traced))
    )
    assert plain[0]["numbers"] == timed[0]["numbers"] == profiled[0]["numbers"]
    assert plain[1]["numbers"] == timed[1]["numbers"] == profiled[1]["numbers"]
    assert [path.name for path in (tmp_path / "2" / "profile").iterdir()] == ["rank_0001_steps_2-3.pt.trace.json"]
    assert not (tmp_path / "0" / "profile").exists() and not (tmp_path / "1" / "profile").exists()
    assert set(plain[0]["records"]) == {STEPS} and "time_forward_s" in plain[0]["records"][STEPS]
