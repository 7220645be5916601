"""Activation recompute: forward without gradients, then again with them. Nothing may be lost or counted twice."""

import pytest
import torch
from megatron.core import tensor_parallel

from adamoe_dist.routing import SUMS
from tests.distributed.cases import counted, merged
from tests.model.layers import PLAIN, hidden_states, layer_of

LOSSES = {"z_loss_coefficient": 0.1, "balance": {"coefficient": 0.5}}
VARIANTS = {
    "plain": {"router": LOSSES},
    "null_types": {"router": LOSSES, "null_types": {"identity": 2, "constant": 3}},
    "capacity": {"router": merged(LOSSES, {"capacity_factor": 0.8})},
    "global_batch": {"router": merged(LOSSES, {"balance": {"scope": "global_batch"}, "score_function": "sigmoid"})},
    "baseline": merged(PLAIN, {"router": merged(LOSSES, {"type": "topk", "balance": {"type": "switch"}})}),
}


def outcome_of(moe, recomputed, scale=0.7):
    """Output, gradients of everything, and counters after two micro-batches, the second padded."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
    layer = layer_of({"moe": moe})
    layer.train()
    values = {}
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[1, 15:] = True
    for number, mask in enumerate((None, padding)):
        if mask is not None and moe["router"].get("type") == "topk":
            mask = None

        def forward(x, mask=mask):
            return layer(x, padding_mask=mask)[0]

        hidden = hidden_states(number).requires_grad_()
        output = tensor_parallel.checkpoint(forward, False, hidden) if recomputed else forward(hidden)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(number)))
        values[f"output {number}"], values[f"input {number}"] = output.detach(), hidden.grad
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        values[name] = parameter.grad
    return values, counted(layer)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recomputed_layer_gives_the_same_gradients_and_counts_once(name):
    values, counts = outcome_of(VARIANTS[name], recomputed=True)
    expected, expected_counts = outcome_of(VARIANTS[name], recomputed=False)
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(values[key], value, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")
        assert value.abs().max() > 1e-4, f"{key} shows nothing"
    assert counts == expected_counts
    sums = counts[0]
    assert set(sums) == {*SUMS, "dispatch_rows", "dispatch_bytes"} and sums["micro_batches"] == 2
    assert sums["balance_loss"] > 0 and sums["z_loss"] > 0
    assert (sums["dropped_pairs"] > 0) == (name == "capacity")


def test_the_losses_take_part_in_these_gradients():
    """Otherwise the equality above would say nothing about them."""
    with_losses, _ = outcome_of(VARIANTS["plain"], recomputed=True)
    without, _ = outcome_of({"router": {"z_loss_coefficient": 0.0, "balance": {"type": "none"}}}, recomputed=True)
    assert (with_losses["router.null_weight"] - without["router.null_weight"]).norm() > 1e-2
    assert without["router.null_weight"].norm() == 0
