"""``run.deterministic=true``: two runs of one command give the same bits; what has no fixed order is refused."""

import os

import pytest

from tests.end_to_end.conftest import one_process, run_command, torchrun
from tests.end_to_end.deterministic import RICH, require_same_metrics

pytestmark = pytest.mark.end_to_end


def test_two_runs_on_two_ranks_have_the_same_metrics(workspace) -> None:
    records = require_same_metrics(
        lambda *options: torchrun(2, *options), workspace, "same", RICH, CUDA_VISIBLE_DEVICES=""
    )
    assert all(record["dispatch_rows"] > 0 and record["grad_norm"] > 0 for record in records[1:])


@pytest.mark.parametrize(
    ("variable", "value"), [("NCCL_ALGO", "NVLS,Ring"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")], ids=lambda value: value
)
def test_a_library_told_otherwise_is_refused_before_it_starts(workspace, variable, value) -> None:
    options = ["--config", "small.yaml", "run.dir=runs/varying", "run.deterministic=true"]
    done = run_command(one_process(*options), workspace, environment={variable: value})
    assert done.returncode == 2
    (message,) = done.errors
    assert f"{variable}={value}" in message and "unset it" in message
    assert not (workspace / "runs" / "varying").exists()
    assert variable not in os.environ
