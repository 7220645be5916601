"""What the forward pass keeps, and a rank's memory, against what autograd saves and what real runs held."""

import os
from typing import Any
from unittest import mock

import pytest
import torch

from adamoe_dist.config import config_from_dict, resolve
from adamoe_dist.planning import DEVICES, Assumptions, Cluster, kept_per_token, make_plan, tokens_of_a_rank
from tests.distributed.cases import BASE, merged

VOCAB = 512
MIB = 2**20
MODEL = {
    "model": {"num_layers": 3, "hidden_size": 128, "head_dim": 24, "num_query_groups": 2, "sequence_length": 128},
    "moe": {"expert_hidden_size": 80, "dense_layers": [1]},
    "train": {"micro_batch_size": 4},
}


@pytest.fixture(scope="module")
def groups():
    from adamoe_dist import platform

    platform.prepare()
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

    with mock.patch.dict(os.environ):
        os.environ.pop("MASTER_PORT", None)
        initialize_groups(Launch(0, 0, 1), resolve(config_from_dict(BASE), 1))
        yield
        destroy_groups()


def saved_bytes(tree: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a token of all storages that autograd saves, weights left out, and true experts a token."""
    from adamoe_dist.model import build_model

    config = config_from_dict(tree)
    model = build_model(config, resolve(config, 1), VOCAB, dtype, cuda=False).model.to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (4, config.model.sequence_length + 1), generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens)
    count = 4 * config.model.sequence_length
    pairs = [layer.counters.packed_routing(torch.device("cpu"))[-8:].sum().item() for layer in model.moe_layers]
    return sum(saved.values()) / count, sum(pairs) / len(pairs) / count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": {"num_null_experts": 0, "top_k": 2}},
        {"moe": {"shared_expert_hidden_size": 56}, "model": {"ffn_hidden_size": 200}},
        {"moe": {"experts": {"kernel": "grouped_mm"}}},
        {"model": {"qk_norm": "head", "head_dim": None, "num_query_groups": None}},
        {"model": {"qk_norm": "head"}},
        {"train": {"recompute": "selective"}, "moe": {"shared_expert_hidden_size": 56}},
        {"train": {"recompute": "full"}},
    ],
)
def test_kept_tensors_are_those_that_autograd_saves(groups, changes: dict[str, Any], precision: str) -> None:
    tree = merged(merged(BASE, MODEL), changes)
    config = config_from_dict(tree)
    saved, load = saved_bytes(tree, torch.float32 if precision == "fp32" else torch.bfloat16)
    kept = kept_per_token(config, resolve(config, 1), VOCAB, precision, load, is_cpu=True)
    assert kept.output + 2 * kept.moe_layer + kept.dense_layer == pytest.approx(saved, rel=0.03)


def test_activations_of_a_rank() -> None:
    """Tensor and context ranks share the tokens; a pipeline's first stage keeps as many micro-batches as it is deep."""
    tree = merged(BASE, {"model": {"num_layers": 4}, "parallel": {"pipeline": 4}, "train": {"micro_batch_size": 1}})
    config = config_from_dict(tree)
    cluster = Cluster(nodes=1, gpus_per_node=4, device=DEVICES["cpu"])
    plan = make_plan(config, cluster, Assumptions.of(DEVICES["cpu"]), VOCAB)
    kept = kept_per_token(config, plan.resolved, VOCAB, "fp32", 1.5, is_cpu=True)
    assert plan.memory.activations == pytest.approx(4 * 32 * kept.moe_layer)
    cut = config_from_dict(merged(BASE, {"parallel": {"tensor": 2, "context": 2, "expert": 1}}))
    assert tokens_of_a_rank(cut, resolve(cut, 4)) == 2 * 32 / 4


MEASURED = [
    (0, "fp32", False, "none", 64, 576, 648),
    (1, "fp32", False, "none", 64, 513, 576),
    (2, "fp32", False, "none", 64, 432, 576),
    (3, "fp32", False, "none", 64, 369, 482),
    (2, "fp32", True, "none", 64, 608, 782),
    (1, "fp32", False, "none", 512, 513, 724),
    (1, "fp32", False, "selective", 512, 513, 703),
    (1, "fp32", False, "full", 512, 513, 607),
    (0, "bf16", False, "none", 64, 648, 729),
    (1, "bf16", False, "none", 64, 504, 620),
    (2, "bf16", False, "none", 64, 360, 467),
    (3, "bf16", False, "none", 64, 333, 446),
    (2, "bf16", True, "none", 64, 484, 591),
]
"""docs/results.md, "Memory by ZeRO stage": live state and peak in MiB. Peaks in bf16 are those with
ONEDNN_MAX_CPU_ISA=AVX512_CORE: oneDNN's own bf16 kernels, compiled for each shape and kept, are no tensors."""


@pytest.mark.parametrize(("stage", "precision", "offload", "recompute", "length", "state", "peak"), MEASURED)
def test_memory_of_measured_runs(stage, precision, offload, recompute, length, state, peak) -> None:
    config = config_from_dict(
        {
            "model": {"hidden_size": 512, "num_layers": 4, "num_attention_heads": 4, "sequence_length": length},
            "moe": {"num_experts": 8, "num_null_experts": 8, "top_k": 3, "expert_hidden_size": 512},
            "parallel": {"expert": 1},
            "zero": {"stage": stage, "offload_optimizer": offload},
            "data": {"tokenizer": "none", "train": [{"path": "none"}]},
            "train": {
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "recompute": recompute,
                "precision": precision,
            },
        }
    )
    cluster = Cluster(nodes=1, gpus_per_node=2, device=DEVICES["cpu"])
    above_the_empty_process = Assumptions.of(DEVICES["cpu"]).changed({"memory_overhead_gib": 0.025})
    plan = make_plan(config, cluster, above_the_empty_process, 8192)
    held = plan.memory.state
    assert (held.total + held.host) / MIB == pytest.approx(state, rel=0.10)
    band = 0.12 if precision == "bf16" else 0.10
    assert plan.memory_gib * 1024 + held.host / MIB == pytest.approx(peak, rel=band)
