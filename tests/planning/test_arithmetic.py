"""The arithmetic of --dry-run against models that are really built."""

import os
from unittest import mock

import pytest
import torch

from adamoe_dist.config import config_from_dict, resolve
from adamoe_dist.planning import count_parameters, describe_run, expected_load, flops_per_token, rank_memory
from adamoe_dist.planning.arithmetic import size_words
from tests.distributed.cases import BASE, merged

VOCAB = 128


@pytest.fixture(scope="module")
def groups():
    from adamoe_dist import platform

    platform.prepare()
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

    config = config_from_dict(BASE)
    with mock.patch.dict(os.environ):
        os.environ.pop("MASTER_PORT", None)
        initialize_groups(Launch(0, 0, 1), resolve(config, 1))
        yield
        destroy_groups()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"num_query_groups": 2, "tie_embeddings": True}},
        {"moe": {"layer_frequency": 2, "shared_expert_hidden_size": 24}},
        {"moe": {"num_null_experts": 0, "top_k": 2}},
        {
            "model": {"num_query_groups": 2, "head_dim": 24, "qk_norm": "head", "qkv_bias": True},
            "moe": {"dense_layers": [0], "shared_expert_hidden_size": 24, "shared_expert_gate": True},
        },
        {"model": {"num_query_groups": 2, "head_dim": 10, "qk_norm": "all"}, "moe": {"dense_layers": [1]}},
        {"moe": {"router": {"null_init": "shared"}}},
        {"moe": {"null_types": {"identity": 2, "constant": 3}, "router": {"gating_residual": True}}},
    ],
)
def test_parameter_count_equals_the_built_model(groups, changes: dict) -> None:
    from adamoe_dist.model import build_model

    config = config_from_dict(merged(BASE, changes))
    model = build_model(config, resolve(config, 1), VOCAB, torch.float32, cuda=False).model
    counted = count_parameters(config, VOCAB)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if getattr(p, "is_expert", False))
    assert counted.expert == experts


def test_the_load_that_a_null_share_leaves() -> None:
    balance = {"type": "grouped", "target_null_share": 0.25}
    assert expected_load(config_from_dict(merged(BASE, {"moe": {"router": {"balance": balance}}}))) == 2.25


def test_active_parameters_and_flops_follow_the_load() -> None:
    config = config_from_dict(BASE)
    counted = count_parameters(config, VOCAB)
    assert expected_load(config) == 1.5
    one_expert = 3 * config.model.hidden_size * config.moe.expert_hidden_size
    assert counted.active(2.0) - counted.active(1.0) == config.model.num_layers * one_expert
    assert flops_per_token(config, counted, 2.0) - flops_per_token(config, counted, 1.0) == (
        6 * config.model.num_layers * one_expert
    )


def test_flops_of_attention_follow_the_heads_width() -> None:
    """Per layer: two products of scores and values over the causal half, each 2 x heads x width a token and key."""
    wide = config_from_dict(merged(BASE, {"model": {"head_dim": 48}}))
    counted, model = count_parameters(wide, VOCAB), wide.model
    scores = 2 * 2 * model.num_attention_heads * 48 * model.sequence_length / 2 * model.num_layers
    products = 2 * (counted.active(1.5) - counted.embedding)
    assert flops_per_token(wide, counted, 1.5) == 3 * (products + scores)


def test_memory_of_a_rank_by_stage_and_layout() -> None:
    config = config_from_dict(BASE)
    counted = count_parameters(config, VOCAB)
    two_ranks = resolve(config_from_dict(merged(BASE, {"parallel": {"expert": 2}})), 2)
    memory = rank_memory(config, two_ranks, counted, "fp32")
    local = counted.dense + counted.expert / 2
    assert memory.weights == 4 * local and memory.gradients == 4 * local
    assert memory.optimizer == 12 * (counted.dense / 2 + counted.expert / 2)
    second = config_from_dict(merged(BASE, {"zero": {"stage": 2}}))
    assert rank_memory(second, two_ranks, counted, "fp32").gradients == 4 * (counted.dense / 2 + counted.expert / 2)
    assert rank_memory(config, two_ranks, counted, "bf16").weights == 2 * local


def test_memory_of_every_stage() -> None:
    config = config_from_dict(BASE)
    counted = count_parameters(config, VOCAB)
    two_ranks = resolve(config_from_dict(merged(BASE, {"parallel": {"expert": 1}})), 2)
    whole, half = counted.total, counted.total / 2

    def memory(stage: int, precision: str, offload: bool = False) -> tuple[float, ...]:
        changed = config_from_dict(merged(BASE, {"zero": {"stage": stage, "offload_optimizer": offload}}))
        found = rank_memory(changed, two_ranks, counted, precision)
        return found.weights, found.gradients, found.optimizer, found.host

    assert memory(0, "fp32") == (4 * whole, 4 * whole, 8 * whole, 0)
    assert memory(0, "bf16") == (2 * whole, 4 * whole, 12 * whole, 0)
    assert memory(1, "fp16") == (2 * whole, 4 * whole, 12 * half, 0)
    assert memory(1, "bf16") == (2 * whole, 6 * whole, 12 * half, 0)
    assert memory(2, "bf16") == (2 * whole, 4 * half, 12 * half, 0)
    assert memory(3, "bf16") == (2 * half, 4 * half, 12 * half, 0)
    assert memory(2, "bf16", offload=True) == (2 * whole, 4 * half, 0, 18 * half)
    assert memory(3, "fp32", offload=True) == (4 * half, 4 * half, 0, 16 * half)


def test_memory_of_a_rank_in_every_degree() -> None:
    """Two stages of two layers, of which one has experts; the embedding is on the first, the output on the last."""
    tree = merged(BASE, {"model": {"num_layers": 4}, "moe": {"layer_frequency": 2}, "zero": {"stage": 0}})
    width, embedding = 64, VOCAB * 64
    attention, feed_forward, expert = 4 * width**2, 12 * width**2, 8 * 3 * width * 48
    norms, router = 2 * width, (8 + 8) * width

    def weights(world_size: int, **degrees: int) -> float:
        config = config_from_dict(merged(tree, {"parallel": degrees}))
        counted = count_parameters(config, VOCAB)
        return rank_memory(config, resolve(config, world_size), counted, "fp32").weights / 4

    layers = 2 * attention + feed_forward
    last = layers + embedding + 2 * norms + router + width
    assert weights(2, pipeline=2, expert=1) == last + expert
    assert weights(4, pipeline=2, tensor=2, expert=1) == (layers + embedding) / 2 + 2 * norms + router + width + expert
    assert weights(4, pipeline=2, expert_tensor=2, expert=1) == last + expert / 2
    no_frequency = {"moe": {"layer_frequency": 1, "dense_layers": [0, 2]}}
    by_name = config_from_dict(merged(merged(tree, no_frequency), {"parallel": {"pipeline": 2, "expert": 1}}))
    counted = count_parameters(by_name, VOCAB)
    assert rank_memory(by_name, resolve(by_name, 2), counted, "fp32").weights / 4 == last + expert
    assert weights(2, tensor=2, expert=2) == layers + embedding + 4 * norms + 2 * router + width + expert


def test_a_target_load_is_what_is_planned_with() -> None:
    config = config_from_dict(merged(BASE, {"moe": {"router": {"target_load": 1.25}}}))
    lines = "\n".join(describe_run(config, resolve(config, 1), VOCAB, "fp32"))
    assert "1.25 true experts a token held (moe.router.target_load)" in lines
    assert f"{count_parameters(config, VOCAB).active(1.25):,} active a token at that load" in lines


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (900, "900 bytes"),
        (1536, "1.5 KiB"),
        (3.21 * 2**20, "3.21 MiB"),
        (1020 * 2**30, "1020 GiB"),
        (2**41, "2 TiB"),
    ],
)
def test_sizes_in_words(size: float, words: str) -> None:
    assert size_words(size) == words
