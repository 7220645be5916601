"""The CPU stand-ins, and the private names of DeepSpeed that this project relies on."""

import importlib
import inspect

import pytest
import torch

from adamoe_dist import platform
from adamoe_dist.platform import megatron_cpu

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for hosts without CUDA")


@needs_no_cuda
def test_installing_twice_changes_nothing_that_is_seen():
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    kernel = getattr(moe_utils, "te_general_gemm", None)
    for _ in range(2):
        megatron_cpu.install_stand_ins()
        assert torch.cuda.current_device() == torch.device("cpu")
        stream = torch.cuda.current_stream()
        assert stream is torch.cuda.default_stream()
        stream.wait_stream(torch.cuda.Stream())
        assert stream.record_event(torch.cuda.Event()).query()
        with torch.cuda.stream(stream):
            torch.ones(1).record_stream(stream)
        assert moe_utils.te_general_gemm is kernel
        move = token_dispatcher.maybe_move_tensor_to_cpu
        splits = torch.tensor([3, 4])
        assert move(splits, as_numpy=True).tolist() == [3, 4] and move(splits) is splits and move(None) is None


@needs_no_cuda
def test_a_real_cuda_runtime_is_never_replaced(monkeypatch):
    megatron_cpu.install_stand_ins()
    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AssertionError, match="must not replace a real CUDA runtime"):
        megatron_cpu.install_stand_ins()
    platform.prepare()
    assert torch.cuda.current_device is before


def test_compiled_collectives_are_left_out_only_for_a_while(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    platform.prepare()
    backend = importlib.import_module("deepspeed.comm.torch")
    builder = backend.build_shm_op
    with platform.without_compiled_collectives():
        assert backend.build_shm_op is not builder and backend.build_shm_op() is None
    assert backend.build_shm_op is builder
    with pytest.raises(RuntimeError, match="inside"), platform.without_compiled_collectives():
        raise RuntimeError("inside")
    assert backend.build_shm_op is builder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with platform.without_compiled_collectives():
        assert backend.build_shm_op is builder


def test_the_private_names_of_deepspeed_exist():
    """What this project uses beyond DeepSpeed's interface; another version may have renamed it."""
    platform.prepare()
    import deepspeed
    import deepspeed.utils.groups as tables
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert callable(importlib.import_module("deepspeed.comm.torch").build_shm_op)
    for name in (
        "_EXPERT_PARALLEL_GROUP",
        "_EXPERT_DATA_PARALLEL_GROUP",
        "_EXPERT_PARALLEL_GROUP_RANKS",
        "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    ):
        assert isinstance(getattr(tables, name), dict), name
    assert hasattr(tables, "expert_tensor_parallel_world_size")
    assert deepspeed.DeepSpeedEngine is DeepSpeedEngine
    assert "DeepSpeedEngine(" in inspect.getsource(deepspeed.initialize)
    configure = inspect.getsource(DeepSpeedEngine._configure_distributed_model)
    assert "has_moe_layers" in configure and "num_experts" in configure
    for optimizer, groups in ((DeepSpeedZeroOptimizer, "bit16_groups"), (BF16_Optimizer, "bf16_groups")):
        source = inspect.getsource(optimizer)
        assert f"self.{groups}" in source and "self.real_dp_process_group" in source, optimizer
