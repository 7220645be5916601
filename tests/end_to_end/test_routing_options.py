"""The router's options together, in a run as a user starts it."""

import pytest

from tests.end_to_end.conftest import metrics_of, run_command, torchrun

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]

OPTIONS = [
    "moe.null_types.identity=2",
    "moe.null_types.constant=2",
    "moe.router.score_function=sigmoid",
    "moe.router.gating_residual=true",
    "moe.router.capacity_factor=0.75",
    "moe.router.balance.type=grouped",
    "moe.router.balance.target_null_share=0.4",
    "moe.router.balance.scope=global_batch",
]


def test_a_run_with_every_option_trains_and_reports_what_it_drops(workspace) -> None:
    done = run_command(
        torchrun(2, "--config", "small.yaml", "run.dir=runs/options", "train.steps=20", *OPTIONS), workspace
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1.80 true experts a token at balance" in done.stdout
    records = [record for record in metrics_of(workspace / "runs" / "options") if "lm_loss" in record]
    assert records[-1]["lm_loss"] < records[0]["lm_loss"]
    for record in records:
        assert 0 < record["dropped_share"] < 1
        computed = record["true_experts_per_token"] * (1 - record["dropped_share"])
        assert record["expert_flops_saved"] == pytest.approx(1 - computed / 2)
        assert record["balance_loss"] > 0
