"""What the GPU tests check, run on CPU cores: it finds no fault there, and finds one that is put in."""

import pytest

from tests.distributed.matrix import LAYOUTS
from tests.gpu import bodies

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("layout", "stage", "precision"), [("EP2", 2, "fp32"), ("PP2", 1, "bf16"), ("CP2", 0, "fp16")], ids=str
)
def test_cpu_ranks_train_as_one_cpu_process(ranks_of, layout, stage, precision):
    world, degrees = LAYOUTS[layout]
    bodies.trains_as_one_cpu_process(ranks_of, ranks_of, world, degrees, stage, precision)


def test_another_training_is_told_apart(ranks_of):
    other = {"moe": {"router": {"balance": {"coefficient": 0.0}}}}
    with pytest.raises(AssertionError, match=r"norms|gradients"):
        bodies.trains_alike(ranks_of, {}, other, "fp32")
    bodies.trains_alike(ranks_of, {"train": {"recompute": "full"}}, {}, "fp32")
