"""The MoE layer inside the model: padding, variants, the baseline, null rows, counters and products."""

import pytest
import torch

from adamoe_dist.routing import read_vector
from tests.distributed.cases import merged, tokens_of
from tests.model.layers import PLAIN, hidden_states, layer_of, model_of


def counts_of(layer):
    """The layer's sums, tokens by load, tokens by expert."""
    sums, statistics = read_vector(layer.counters.vector(torch.device("cpu")), layer.counters.num_experts)
    return sums, statistics.tokens_by_load_L, statistics.expert_counts_E


def expert_inputs(layers):
    """Shapes of all experts' inputs, as they are called."""
    shapes = []
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda _, arguments: shapes.append(arguments[0].shape[0]))
    return shapes


def windows(batch=2, length=32):
    return tokens_of(0, batch, length)


def test_products_are_computed_for_true_pairs_only():
    model = model_of({}).train()
    shapes = expert_inputs(model.moe_layers)
    model(windows()).mean().backward()
    for layer, rows in zip(model.moe_layers, shapes, strict=True):
        _, by_load, by_expert = counts_of(layer)
        assert rows == int(by_expert.sum()) == int((by_load * torch.arange(4)).sum())
        assert 0 < rows < 3 * 64 and int(by_load.sum()) == 64


def test_an_all_null_batch_has_no_rows_and_zero_gradients():
    layer = layer_of({})
    layer.train()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.null_weight.copy_(torch.randn_like(layer.router.null_weight) * 0.01)
        layer.router.null_weight[:, 0] = 10.0
    hidden = hidden_states().abs().requires_grad_()
    shapes = expert_inputs([layer])
    output = layer(hidden)[0]
    assert shapes == [0] and output.count_nonzero() == 0
    (output.sum() * 1.0).backward()
    for weight in (layer.experts.weight1, layer.experts.weight2):
        assert weight.grad is not None and weight.grad.count_nonzero() == 0
    assert counts_of(layer)[1].tolist() == [48, 0, 0, 0]


@pytest.mark.parametrize("router", ["adamoe", "shared_expert"])
def test_padding_is_routed_nowhere_and_changes_nothing_before_it(router):
    changes = {"moe": {"shared_expert_hidden_size": 24}} if router == "shared_expert" else {}
    model = model_of(changes).train()
    tokens, padding = windows(), torch.zeros(2, 32, dtype=torch.bool)
    padding[0, 20:], padding[1, 5:] = True, True
    whole = model(tokens)
    shapes = expert_inputs(model.moe_layers)
    for layer in model.moe_layers:
        layer.counters.reset()
    masked = model(tokens, padding)
    torch.testing.assert_close(masked[~padding], whole[~padding])
    garbled = tokens.clone()
    garbled[:, :-1][padding] = 3
    before = [counts_of(layer)[2].clone() for layer in model.moe_layers]
    again = model(garbled, padding)
    read_and_predicted_real = ~padding & ~torch.cat([padding[:, 1:], padding[:, -1:]], dim=1)
    torch.testing.assert_close(again[read_and_predicted_real], masked[read_and_predicted_real])
    for layer, once, rows, more in zip(model.moe_layers, before, shapes[:3], shapes[3:], strict=True):
        _, by_load, by_expert = counts_of(layer)
        assert rows == more == int(once.sum())
        assert torch.equal(by_expert, 2 * once)
        assert int(by_load.sum()) == 2 * 25


def test_padding_does_not_enter_the_router_losses():
    """Losses of a padded batch are those of its real tokens alone."""
    layer = layer_of({"moe": {"router": {"z_loss_coefficient": 0.1}}})
    layer.train()
    hidden = hidden_states(batch=2)
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[1] = True
    layer(hidden, padding_mask=padding)
    padded = counts_of(layer)
    layer.counters.reset()
    layer(hidden[:, :1].contiguous())
    alone = counts_of(layer)
    for name in ("balance_loss", "z_loss"):
        assert padded[0][name] == pytest.approx(alone[0][name], rel=1e-6) and alone[0][name] > 0
    assert torch.equal(padded[1], alone[1]) and torch.equal(padded[2], alone[2])


@pytest.mark.parametrize(
    ("moe", "experts_in"),
    [({"shared_expert_hidden_size": 40}, [0, 1, 2]), ({"layer_frequency": 2}, [1]), ({"layer_frequency": 3}, [2])],
)
def test_variants_run_and_every_weight_gets_a_gradient(moe, experts_in):
    model = model_of({"moe": moe}).train()
    layers = model.gpt.decoder.layers
    assert [i for i, layer in enumerate(layers) if layer.mlp in model.moe_layers] == experts_in
    model(windows()).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    if "shared_expert_hidden_size" in moe:
        assert sum("shared_experts" in name for name, _ in model.named_parameters()) == 6


@pytest.mark.parametrize(("kind", "rows"), [("random", 8), ("copy", 8), ("shared", 1)])
def test_null_rows_have_their_shape_and_learn_from_the_balance_loss(kind, rows):
    layer = layer_of({"moe": {"router": {"null_init": kind}}})
    layer.train()
    assert layer.router.weight.shape == (8, 64) and layer.router.null_weight.shape == (rows, 64)
    assert layer.router.gating(hidden_states()).shape == (48, 16)
    distance = torch.cdist(layer.router.null_weight, layer.router.weight)
    if kind == "copy":
        assert torch.equal(distance.argmin(dim=1), torch.arange(8)) and 0 < distance.diagonal().max() < 0.2
    layer(hidden_states())[0].sum().backward()
    assert layer.router.null_weight.grad.norm() > 0


def test_the_router_of_a_bf16_model_computes_in_fp32():
    router = layer_of({}).router.to(torch.bfloat16)
    hidden = hidden_states().to(torch.bfloat16)
    scores = router.gating(hidden)
    rows = torch.cat([router.weight, router.null_weight]).double()
    exact = hidden.flatten(0, 1).double() @ rows.T
    assert router.weight.dtype == torch.bfloat16 and scores.dtype == torch.float32
    error = (scores.double() - exact).abs().max()
    rounded = (exact.bfloat16().double() - exact).abs().max()
    assert error < 1e-3 * rounded


def test_the_shared_row_receives_the_sum_of_its_columns_gradients():
    layer = layer_of({"moe": {"router": {"null_init": "shared"}}})
    hidden = hidden_states()
    scores = layer.router.gating(hidden)
    cotangent = torch.randn(48, 16, generator=torch.Generator().manual_seed(3))
    scores.backward(cotangent)
    wanted = cotangent[:, 8:].sum(dim=1, keepdim=True).t() @ hidden.reshape(48, 64)
    torch.testing.assert_close(layer.router.null_weight.grad, wanted, rtol=1e-4, atol=1e-4)


def test_without_null_experts_there_is_no_null_weight():
    names = [name for name, _ in layer_of({"moe": PLAIN}).named_parameters()]
    assert names and not any("null" in name for name in names)


def test_the_balance_coefficient_can_be_changed_between_steps():
    losses, gradients = [], []
    layer = layer_of({})
    layer.train()
    assert layer.router.balance_coefficient == 0.02
    for coefficient in (0.02, 0.04, 0.0):
        layer.router.balance_coefficient = coefficient
        layer.counters.reset(), layer.zero_grad()
        layer(hidden_states())[0].sum().mul(0.0).backward()
        losses.append(counts_of(layer)[0]["balance_loss"])
        gradients.append(layer.router.null_weight.grad.clone())
    z_only = gradients[2]
    assert losses[1] == pytest.approx(2 * losses[0]) and losses[0] > 0 and losses[2] == 0
    torch.testing.assert_close(gradients[1] - z_only, 2 * (gradients[0] - z_only), rtol=1e-3, atol=1e-6)


def test_evaluation_counts_nothing_and_attaches_nothing():
    layer = layer_of({})
    layer.eval()
    output = layer(hidden_states())[0]
    assert all(value == 0 for value in counts_of(layer)[0].values())
    output.sum().mul(0.0).backward()
    assert layer.router.null_weight.grad is None or layer.router.null_weight.grad.count_nonzero() == 0


def test_the_baseline_counts_what_megatron_attaches():
    from megatron.core.transformer.moe import router as megatrons

    attached = []
    original = megatrons.MoEAuxLossAutoScaler

    class Seen:
        @staticmethod
        def apply(activation, loss):
            attached.append(float(loss))
            return original.apply(activation, loss)

    balance = {"type": "switch", "coefficient": 0.5}
    moe = merged(PLAIN, {"router": {"type": "topk", "z_loss_coefficient": 0.25, "balance": balance}})
    layer = layer_of({"moe": moe})
    layer.train()
    assert type(layer.token_dispatcher).__name__ == "MoEAlltoAllTokenDispatcher"
    shapes = expert_inputs([layer])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatrons, "MoEAuxLossAutoScaler", Seen)
        output = layer(hidden_states())[0]
    sums, by_load, by_expert = counts_of(layer)
    z, balance_loss = attached
    assert (sums["z_loss"], sums["balance_loss"]) == (pytest.approx(z), pytest.approx(balance_loss))
    assert balance_loss > 0.9 * 0.5 * 2 and z > 0
    assert by_load.tolist() == [0, 0, 48] and int(by_expert.sum()) == 96 and shapes == [96]
    assert sums["micro_batches"] == 1 and sums["dispatch_rows"] == 0
    output.sum().backward()
    ours = layer_of({"moe": merged(moe, {"router": {"type": "adamoe"}})})
    ours.train()
    assert torch.equal(ours(hidden_states())[0], output)
    same_sums, _, same_experts = counts_of(ours)
    assert torch.equal(same_experts, by_expert)
    for name in ("balance_loss", "z_loss"):
        assert same_sums[name] == pytest.approx(sums[name], rel=1e-5)
