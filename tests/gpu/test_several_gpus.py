"""Layouts over NCCL train as one process on CPU cores does: two ranks on two GPUs, four on four."""

import pytest

from tests.distributed.matrix import LAYOUTS
from tests.gpu.bodies import trains_as_one_cpu_process

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_one_cpu_process(gpus, cpus, layout, stage):
    world, degrees = LAYOUTS[layout]
    if stage == 3 and degrees.get("pipeline", 1) > 1:
        pytest.skip("zero.stage=3 under a pipeline is refused")
    trains_as_one_cpu_process(gpus, cpus, world, degrees, stage, "fp32")


@pytest.mark.parametrize("layout", ["DP2", "EP2", "TP2 EP2", "PP2", "CP2 EP2", "ETP2"])
def test_bf16_stays_near_one_cpu_process(gpus, cpus, layout):
    world, degrees = LAYOUTS[layout]
    trains_as_one_cpu_process(gpus, cpus, world, degrees, 1, "bf16")
