"""One GPU trains as one process on CPU cores does: ZeRO stages, precisions, offload, recompute, kernels."""

import pytest

from tests.distributed.cases import merged
from tests.distributed.zero_checks import staged
from tests.gpu.bodies import trains_alike, trains_as_one_cpu_process

pytestmark = pytest.mark.gpu

ALONE = {"expert": 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_trains_as_one_cpu_process(gpus, cpus, stage, precision):
    trains_as_one_cpu_process(gpus, cpus, 1, ALONE, stage, precision)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_trains_alike(gpus, stage):
    offload = {"zero": {"offload_optimizer": True}, "optimizer": {"implementation": "torch"}}
    trains_alike(gpus, merged(staged({}, stage), offload), staged({}, stage), "fp32")


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_activations_change_nothing(gpus, stage, recompute):
    trains_alike(gpus, merged(staged({}, stage), {"train": {"recompute": recompute}}), staged({}, stage), "fp32")


def test_the_grouped_product_is_that_of_single_experts(gpus):
    grouped, single = ({"moe": {"experts": {"kernel": kernel}}} for kernel in ("grouped_mm", "sequential"))
    trains_alike(gpus, grouped, single, "bf16")
