"""Without null experts the layer is Megatron's own, bit for bit."""

import pytest
import torch

from tests.distributed.cases import merged
from tests.model.layers import PLAIN, layer_of, megatrons_layer, run_both, run_layer

NORMALIZE = [("true_experts", False), ("none", True)]


@pytest.mark.parametrize(("normalize", "pre_softmax"), NORMALIZE)
def test_output_and_gradients_are_megatrons_bit_for_bit(normalize, pre_softmax):
    moe = merged(PLAIN, {"router": {"normalize": normalize}})
    ours, theirs = run_both({"moe": moe}, 1, 0, moe_router_pre_softmax=pre_softmax)
    assert ours.keys() == theirs.keys() and len(ours) == 3 + 2 * 8
    for name, value in theirs.items():
        assert float(value.abs().max()) > 1e-3, f"{name} shows nothing"
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("top_k", [1, 3])
def test_output_and_gradients_are_megatrons_for_other_top_k(top_k):
    """Sums of more than two experts may round in another order, hence not bit for bit beyond k = 2."""
    moe = merged(PLAIN, {"top_k": top_k, "router": {"normalize": "none"}})
    ours, theirs = run_both({"moe": moe}, 1, 0, moe_router_pre_softmax=True)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["switch", "null_averaged"])
def test_the_balance_loss_is_megatrons_with_k_times_its_coefficient(kind):
    """At perfect balance Megatron's loss is its coefficient, the paper's is k times alpha."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    alpha, k = 5.0, PLAIN["top_k"]
    changes = {"moe": merged(PLAIN, {"router": {"balance": {"type": kind, "coefficient": alpha}}})}
    ours = layer_of(changes)
    theirs = megatrons_layer(ours, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=k * alpha)
    ours.train(), theirs.train()
    with_loss, megatrons = run_layer(ours, size=1e-3), run_layer(theirs, size=1e-3)
    without = run_layer(layer_of({"moe": PLAIN}), size=1e-3)
    for name, value in megatrons.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(with_loss[name] / scale, value / scale, rtol=0, atol=1e-6)
    assert (with_loss["router"] - without["router"]).norm() > 0.1 * without["router"].norm()
    assert torch.equal(with_loss["output"], without["output"])
