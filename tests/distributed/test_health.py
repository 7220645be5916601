"""A step with a NaN or infinite number anywhere changes nothing, on any rank; too many in a row stop the run."""

from typing import Any

import pytest

from tests.distributed.cases import merged
from tests.distributed.health_checks import BAD_STEP, run_spoiled, run_spoiled_in_fp16
from tests.distributed.marks import quick
from tests.distributed.zero_checks import staged

pytestmark = pytest.mark.distributed

KINDS = ["gradient", "nan_loss", "inf_loss"]
HELD_LOAD = {"moe": {"router": {"target_load": 1.4}}}
OFFLOAD = {"zero": {"offload_optimizer": True}, "optimizer": {"implementation": "torch"}}
PIPELINE = {"parallel": {"pipeline": 2, "expert": 1}, "model": {"num_layers": 4, "tie_embeddings": True}}
UNCLIPPED = {"train": {"gradient_clipping": 0.0}}
SETTINGS: dict[str, dict[str, Any]] = {"": {}, "offload": OFFLOAD, "pipeline": PIPELINE, "unclipped": UNCLIPPED}
CASES = [(stage, precision, "") for stage in range(4) for precision in ("fp32", "bf16")]
CASES += [(stage, precision, "offload") for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
CASES += [(stage, precision, "pipeline") for stage in (0, 1, 2) for precision in ("fp32", "bf16")]
CASES += [(stage, "fp32", "unclipped") for stage in range(4)]
CASES = [(*case, kind) for case in CASES for kind in KINDS]
CHOSEN = [
    (0, "fp32", "", "gradient"),
    (0, "bf16", "", "inf_loss"),
    (1, "bf16", "", "inf_loss"),
    (2, "bf16", "offload", "gradient"),
    (2, "fp32", "pipeline", "nan_loss"),
    (3, "fp32", "", "inf_loss"),
]
ONE_STEP = range(BAD_STEP, BAD_STEP + 1)
_LEFT_OUT: dict[Any, list[dict[str, Any]]] = {}


@pytest.mark.parametrize(("stage", "precision", "setting", "kind"), quick(CASES, CHOSEN))
def test_a_bad_step_on_one_rank_leaves_no_trace_on_any(ranks_of, stage, precision, setting, kind):
    """The reference never sees the batch; its step counter goes on. All bits, five steps, on both ranks."""
    changes = merged(merged(staged({}, stage), HELD_LOAD), SETTINGS[setting])
    key = (stage, precision, setting)
    if key not in _LEFT_OUT:
        _LEFT_OUT[key] = ranks_of(2).run(run_spoiled, changes, precision, "left_out", ONE_STEP)
    outcome = ranks_of(2).run(run_spoiled, changes, precision, kind, ONE_STEP)
    for mine, reference in zip(outcome, _LEFT_OUT[key], strict=True):
        assert mine["stop"] == "" and mine["finite"]
        assert mine["events"] == {"bad_steps": 1}
        for name, digest in reference["digests"].items():
            assert mine["digests"][name] == digest, name
        others = [number for number in range(5) if number != BAD_STEP]
        assert [mine["losses"][n] for n in others] == [reference["losses"][n] for n in others]
        assert [mine[name] for name in ("updates", "step", "consumed")] == [4, 5, 40]
        assert reference["updates"] == 4


@pytest.mark.slow
def test_the_very_first_step_may_be_bad(ranks_of):
    changes = staged({}, 1)
    expected = ranks_of(2).run(run_spoiled, changes, "bf16", "left_out", range(1))
    outcome = ranks_of(2).run(run_spoiled, changes, "bf16", "gradient", range(1))
    assert [o["digests"] for o in outcome] == [e["digests"] for e in expected]


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], [2]))
def test_a_bad_loss_leaves_the_loss_scale_of_fp16(ranks_of, stage):
    changes = staged({}, stage)
    expected = ranks_of(2).run(run_spoiled_in_fp16, changes, "fp16", "left_out", ONE_STEP)
    outcome = ranks_of(2).run(run_spoiled_in_fp16, changes, "fp16", "inf_loss", ONE_STEP)
    for mine, reference in zip(outcome, expected, strict=True):
        assert mine["events"] == {"bad_steps": 1}
        assert [mine[k] for k in ("scale", "skipped", "digests")] == [
            reference[k] for k in ("scale", "skipped", "digests")
        ]


def test_bad_steps_in_a_row_stop_the_run_with_what_was_good(ranks_of):
    changes = merged(staged({}, 2), {"train": {"max_bad_steps": 2}})
    expected = ranks_of(2).run(run_spoiled, changes, "fp32", "left_out", range(2, 99))
    outcome = ranks_of(2).run(run_spoiled, changes, "fp32", "gradient", range(2, 99))
    for mine, reference in zip(outcome, expected, strict=True):
        assert mine["stop"].startswith("the gradient norm of step 4 is not finite; its batch is the samples from 24")
        assert "train.max_bad_steps=2" in mine["stop"]
        assert mine["digests"] == reference["digests"] and mine["finite"]
        assert (mine["step"], mine["consumed"], mine["events"]) == (4, 32, {"bad_steps": 2})
