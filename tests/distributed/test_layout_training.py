"""What the matrix leaves out, under each degree: padding, the target load, Megatron's own router, HF families."""

import pytest
import torch

from tests.distributed.cases import merged, train
from tests.distributed.matrix import COMMON, LAYOUTS, SGD, apart, deviation

pytestmark = pytest.mark.distributed

STEPS = 3
CELLS = ["TP2 EP2", "CP2", "PP2", "ETP2", "TP2 x PP2"]
BASE = merged(merged(COMMON, SGD), {"zero": {"stage": 2}, "train": {"micro_batch_size": 2}})
BASELINE = {
    "moe": {"num_null_experts": 0, "top_k": 2, "router": {"type": "topk", "balance": {"type": "switch"}}},
}
TARGET = {
    "moe": {"router": {"target_load": 1.2, "balance": {"type": "none"}}},
    "schedule": {"total_steps": 100},
}
FAMILIES = {
    "heads normed": {
        "model": {"num_query_groups": 2, "head_dim": 12, "qk_norm": "head", "qkv_bias": True, "ffn_hidden_size": 40},
        "moe": {"dense_layers": [0], "shared_expert_gate": True, "router": {"normalize": "all_true"}},
    },
    "heads normed together": {
        "model": {"num_query_groups": 2, "head_dim": 12, "qk_norm": "all", "ffn_hidden_size": 40},
        "moe": {"dense_layers": [1, 2], "shared_expert_gate": True},
    },
}
"""What models that other families bring have besides: head widths, norms, biases, gates, dense layers."""
NULL_OUTPUTS = {"moe": {"null_types": {"identity": 1, "constant": 1}}}


def assert_alike(ranks_of, changes, layout, padded=False):
    world, degrees = LAYOUTS[layout]
    changes = merged(BASE, changes)
    (single,) = ranks_of(1).run(train, changes, STEPS, 1, "fp32", None, padded)
    outcomes = ranks_of(world).run(train, changes, STEPS, degrees, "fp32", None, padded)
    found = deviation(outcomes[-1], single)
    print(layout, found)
    assert max(found.losses, found.norms, found.weights) < 1e-5
    for ours, theirs in zip(outcomes[0].balance_losses, single.balance_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    return single, outcomes, found


@pytest.mark.parametrize("layout", CELLS)
def test_uneven_padding_counts_nowhere(ranks_of, layout):
    """The balance loss and the z-loss divide by real tokens, of which the ranks of a sequence have unequal numbers."""
    _, _, found = assert_alike(ranks_of, {}, layout, padded=True)
    assert found.gradients < 1e-5


@pytest.mark.parametrize("layout", CELLS)
def test_the_target_loads_bias_is_the_same_everywhere(ranks_of, layout):
    single, outcomes, _ = assert_alike(ranks_of, TARGET, layout)
    held = {}
    for outcome in outcomes:
        for name, bias_E in outcome.biases.items():
            assert torch.equal(held.setdefault(name, bias_E), bias_E), name
    assert held.keys() == single.biases.keys()
    for name, bias_E in single.biases.items():
        assert bias_E.count_nonzero() and torch.equal(bias_E, held[name]), name


@pytest.mark.parametrize("layout", CELLS)
def test_megatrons_router_trains_alike(ranks_of, layout):
    _, _, found = assert_alike(ranks_of, BASELINE, layout)
    assert found.gradients < 1e-5


@pytest.mark.parametrize("layout", CELLS)
def test_null_experts_with_an_output_train_alike(ranks_of, layout):
    """A constant expert's mixture gets a gradient that nearly cancels: its rounding is that of its terms' size.

    The terms are as large as those of the constant's own gradient.
    """
    single, outcomes, _ = assert_alike(ranks_of, NULL_OUTPUTS, layout)
    for name, gradient in single.gradients.items():
        scale = single.gradients[name.replace("mixture_weight", "constant")]
        assert apart(outcomes[0].gradients[name], gradient, scale) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "layout", ["TP2 EP2", "CP2", "PP2", *(pytest.param(cell, marks=pytest.mark.slow) for cell in ("EP2", "TP2 x PP2"))]
)
def test_other_families_layers_train_alike(ranks_of, layout, family):
    """Vectors start at 1 and 0 and move in training, so that later losses show a norm or a bias that is not used."""
    changes = merged(FAMILIES[family], {"zero": {"stage": 1}})
    single, _, found = assert_alike(ranks_of, changes, layout)
    assert found.gradients < 1e-5
    for name, weight in single.weights.items():
        assert not torch.equal(weight, single.initial[name]), f"{name} does not learn"
