"""``run.deterministic=true`` gives the same bits on CUDA: one GPU, and where there are two, expert parallelism."""

import pytest

from tests.end_to_end.conftest import one_process, torchrun
from tests.end_to_end.deterministic import RICH, require_same_metrics
from tests.gpu.places import missing

pytestmark = pytest.mark.gpu
pytest.importorskip("sentencepiece")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("router", ["adamoe", "topk"])
def test_two_runs_on_one_gpu_have_the_same_metrics(workspace, router, precision):
    baseline = ["moe.router.type=topk", "moe.num_null_experts=0", "moe.top_k=2", "moe.router.balance.type=switch"]
    changes = [*(baseline if router == "topk" else RICH), f"train.precision={precision}"]
    require_same_metrics(one_process, workspace, f"one-{router}-{precision}", changes)


def test_two_runs_on_two_gpus_have_the_same_metrics(workspace):
    reason = missing(2)
    if reason:
        pytest.skip(reason)
    require_same_metrics(lambda *arguments: torchrun(2, *arguments), workspace, "two", [*RICH, "zero.stage=2"])
