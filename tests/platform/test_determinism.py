"""What torch and CUDA's libraries are told for the same bits, and in which order."""

import os

import pytest
import torch

from adamoe_dist import platform
from adamoe_dist.errors import UserError


@pytest.fixture
def environment(monkeypatch):
    """No word on determinism in it; what a test sets is taken back, in torch too."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_libraries_are_told_first(environment):
    with pytest.raises(RuntimeError, match="after CUDA's libraries"):
        platform.seed_everything(1, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    platform.fix_order_of_sums()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Ring"
    platform.seed_everything(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    platform.seed_everything(1, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("algorithm", ["NVLS", "allreduce:nvlstree", "Ring,CollnetDirect", "PAT"])
def test_collectives_of_varying_order_are_refused(environment, algorithm):
    environment.setenv("NCCL_ALGO", algorithm)
    with pytest.raises(UserError, match=f"NCCL_ALGO={algorithm}.*unset it or use Ring or Tree"):
        platform.fix_order_of_sums()


@pytest.mark.parametrize("algorithm", ["Tree", "^NVLS", "allreduce:tree;allgather:ring"])
def test_an_order_that_the_user_fixed_is_left(environment, algorithm):
    environment.setenv("NCCL_ALGO", algorithm)
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    platform.fix_order_of_sums()
    assert os.environ["NCCL_ALGO"] == algorithm and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
