"""Model FLOP/s against products that are counted while a model computes, and MFU against a known peak."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adamoe_dist import platform
from adamoe_dist.config import Config, config_from_dict, resolve
from adamoe_dist.planning import DEVICES, find_device
from adamoe_dist.training.speed import ModelSpeed
from tests.distributed.cases import BASE, VOCAB, merged, tokens_of


def speed_of(config: Config, world_size: int = 1) -> ModelSpeed:
    return ModelSpeed.of(config, config.padded_vocab_size(VOCAB), world_size)


@pytest.fixture
def groups() -> Iterator[None]:
    platform.prepare()
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

    with mock.patch.dict(os.environ):
        os.environ.pop("MASTER_PORT", None)
        initialize_groups(Launch(0, 0, 1), resolve(config_from_dict(BASE), 1))
        yield
        destroy_groups()


@pytest.mark.parametrize(
    "moe",
    [
        {"shared_expert_hidden_size": 24, "layer_frequency": 2},
        {"router": {"capacity_factor": 0.5}},
        {"num_null_experts": 0, "top_k": 2},
    ],
)
def test_model_flops_are_those_that_a_forward_pass_makes(groups, moe) -> None:
    from adamoe_dist.model import build_model
    from adamoe_dist.routing import read_vector

    config = config_from_dict(merged(BASE, {"moe": {**moe, "experts": {"kernel": "sequential"}}}))
    model = build_model(config, resolve(config, 1), VOCAB, torch.float32, cuda=False).model.train()
    tokens = tokens_of(0, 4, config.model.sequence_length)
    count = tokens[:, 1:].numel()
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    vectors = [layer.counters.vector(torch.device("cpu")) for layer in model.moe_layers]
    sums, routing = read_vector(torch.stack(vectors).sum(dim=0), config.moe.num_experts)
    pairs = int(routing.true_slots) - sums["dropped_pairs"]
    assert (sums["dropped_pairs"] > 0) == ("capacity_factor" in moe.get("router", {}))
    # The counter knows no attention on the CPU; of scores and values the causal half counts.
    attention = 2 * 2 * config.model.num_layers * config.model.hidden_size * config.model.sequence_length / 2
    norms = 2 * (2 * config.model.num_layers + 1) * config.model.hidden_size  # counted as if they were matrices
    forward = counter.get_total_flops() / count + attention + norms
    fields = speed_of(config).fields(1000.0, pairs / count / len(model.moe_layers))
    assert fields == {"model_flops_per_second": pytest.approx(3 * forward * 1000.0, rel=1e-9)}


def test_mfu_is_against_the_peak_of_all_ranks() -> None:
    unknown = speed_of(config_from_dict(BASE))
    assert "set monitor.peak_tflops" in unknown.describe() and "CPU" in unknown.describe()
    config = config_from_dict(merged(BASE, {"monitor": {"peak_tflops": 0.5}}))
    fields = speed_of(config, 4).fields(1e5, 1.5)
    assert fields["mfu"] == pytest.approx(fields["model_flops_per_second"] / (4 * 0.5e12))
    assert fields["model_flops_per_second"] == unknown.fields(1e5, 1.5)["model_flops_per_second"]
    assert "0.5 TFLOP/s a rank (monitor.peak_tflops)" in speed_of(config).describe()


def test_the_peak_of_a_known_gpu_in_the_precision_of_the_run(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert speed_of(config_from_dict(BASE)).peak_flops == 989e12
    assert speed_of(config_from_dict(merged(BASE, {"train": {"precision": "fp32"}}))).peak_flops == 67e12
    assert speed_of(config_from_dict(merged(BASE, {"monitor": {"peak_tflops": 700.0}}))).peak_flops == 700e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert "no peak is known of Tesla T4; set monitor.peak_tflops" in speed_of(config_from_dict(BASE)).describe()


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_gpus_by_the_name_that_the_driver_gives(gpu: str, device: str | None) -> None:
    assert find_device(gpu) == (DEVICES[device] if device else None)
