"""A layer with zero, identity and constant experts against one written token by token in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.distributed.cases import counted, merged, tokens_of
from tests.model.layers import hidden_states, layer_of, model_of
from tests.routing import reference

MOE = {"router": {"balance": {"type": "none"}, "z_loss_coefficient": 0.0}}


def layer_with(types, router=None):
    layer = layer_of({"moe": merged(MOE, {"null_types": types, "router": router or {}})})
    layer.train()
    if types.get("constant"):
        with torch.no_grad():
            layer.null_experts.constant.normal_(generator=torch.Generator().manual_seed(5))
    return layer


def expert_output(x, column, weights, types):
    """What one column of n = m = 8 returns: a SwiGLU, nothing, the token, or a mixture with a vector."""
    first_identity = 16 - types["identity"] - types["constant"]
    if column < 8:
        gate, up = (weights["experts.weight1"][column] @ x).chunk(2)
        return weights["experts.weight2"][column] @ (F.silu(gate) * up)
    if column < first_identity:
        return torch.zeros_like(x)
    if column < first_identity + types["identity"]:
        return x
    number = column - first_identity - types["identity"]
    part = torch.softmax(weights["null_experts.mixture_weight"][number] @ x, dim=0)
    return part[0] * x + part[1] * weights["null_experts.constant"][number]


def slow_layer(hidden, weights, types, normalize):
    rows = torch.cat((weights["router.weight"], weights["router.null_weight"]))
    outputs = []
    for x in hidden.reshape(-1, hidden.shape[-1]):
        scores = rows @ x
        chosen = reference.top_k(scores.tolist(), 3)
        first_with_output = 16 - types["identity"] - types["constant"]
        working = [column for column in chosen if column < 8 or column >= first_with_output]
        over = {"true_experts": working, "all_selected": chosen, "none": list(range(16))}[normalize]
        total = sum(scores[column].exp() for column in over)
        terms = [scores[c].exp() / total * expert_output(x, c, weights, types) for c in working]
        outputs.append(sum(terms) if terms else torch.zeros_like(x))
    return torch.stack(outputs).view(hidden.shape)


@pytest.mark.parametrize("normalize", ["true_experts", "all_selected", "none"])
@pytest.mark.parametrize(("identity", "constant"), [(0, 0), (3, 0), (0, 3), (2, 4), (4, 4)])
def test_output_and_gradients_equal_the_token_by_token_layer(identity, constant, normalize):
    types = {"identity": identity, "constant": constant}
    layer = layer_with(types, {"normalize": normalize})
    hidden = hidden_states(sequence=12).requires_grad_()
    cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(8))
    output = layer(hidden)[0]
    output.backward(cotangent)
    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = hidden.detach().double().requires_grad_()
    expected = slow_layer(exact, weights, types, normalize)
    expected.backward(cotangent.double())
    assert ("null_experts.constant" in weights) == (constant > 0)
    close(output.detach(), expected.detach(), "output")
    close(hidden.grad, exact.grad, "input")
    for name, parameter in layer.named_parameters():
        wanted = weights[name].grad
        close(parameter.grad, torch.zeros_like(weights[name]) if wanted is None else wanted, name)


def close(ours, exact, name):
    scale = float(exact.abs().max()) or 1.0
    assert float((ours.double() - exact).abs().max()) < 1e-5 * scale, name


def test_no_null_expert_of_any_kind_sends_a_row():
    layer = layer_with({"identity": 3, "constant": 3})
    rows = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    layer(hidden_states())
    _, (by_load, by_expert) = counted(layer)
    assert rows == [sum(by_expert)] and by_load[0] > 0 and sum(by_load) == 48


def test_padding_gets_nothing_from_identity_and_constant_experts():
    layer = layer_with({"identity": 4, "constant": 4})
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[1, 10:] = True
    hidden = hidden_states()
    output, whole = layer(hidden, padding_mask=padding)[0], layer(hidden)[0]
    assert output[10:, 1].eq(0).all() and whole[10:, 1].ne(0).any()
    torch.testing.assert_close(output[:10], whole[:10])


@pytest.mark.parametrize(("identity", "constant"), [(8, 0), (0, 8)])
def test_a_model_trains_and_every_weight_gets_a_gradient(identity, constant):
    model = model_of({"moe": {"null_types": {"identity": identity, "constant": constant}}}).train()
    model(tokens_of(0, 2, 32)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    assert sum("null_experts" in name for name, _ in model.named_parameters()) == (6 if constant else 0)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity_limits_every_expert_and_counts_what_it_drops(policy):
    """48 tokens x load 1.5 / 8 experts = 9 rows an expert at factor 1."""
    router = {"capacity_factor": 1.0, "drop_policy": policy}
    layer, free = layer_with({}, router), layer_with({})
    rows = []
    layer.experts.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[1].tolist()))
    output, whole = layer(hidden_states())[0], free(hidden_states())[0]
    sums, (by_load, by_expert) = counted(layer)
    assert (by_load, by_expert) == counted(free)[1], "what was selected does not change"
    assert rows[0] == [min(count, 9) for count in by_expert]
    assert sums["dropped_pairs"] == sum(by_expert) - sum(rows[0]) > 0
    assert not torch.equal(output, whole)
    if policy == "position":
        torch.testing.assert_close(output[:4], whole[:4])
    roomy = layer_with({}, {"capacity_factor": 100.0})
    assert torch.equal(roomy(hidden_states())[0], whole) and counted(roomy)[0]["dropped_pairs"] == 0


def test_a_dropped_pair_leaves_the_other_weights_as_they_are():
    layer, free = layer_with({}, {"capacity_factor": 0.5}), layer_with({})
    dropped_probs, dropped_map = layer.route(hidden_states())
    probs, routing_map = free.route(hidden_states())
    assert (routing_map & ~dropped_map).any() and not (dropped_map & ~routing_map).any()
    assert torch.equal(dropped_probs, probs.masked_fill(~dropped_map, 0.0))


def test_tokens_with_nan_are_counted_and_the_others_go_on():
    layer = layer_with({"identity": 2, "constant": 2})
    hidden = hidden_states()
    clean = layer(hidden)[0]
    layer.counters.reset()
    broken = hidden.clone()
    broken[3, 0], broken[5, 1, 7] = float("nan"), float("inf")
    output = layer(broken)[0]
    assert counted(layer)[0]["nonfinite_tokens"] == 2
    fine = torch.ones(24, 2, dtype=torch.bool)
    fine[3, 0] = fine[5, 1] = False
    torch.testing.assert_close(output[fine], clean[fine])
    assert output[3, 0].isnan().any()


def test_the_baseline_counts_nan_tokens_too():
    moe = {"num_null_experts": 0, "top_k": 2, "router": {"type": "topk", "balance": {"type": "switch"}}}
    layer = layer_of({"moe": moe})
    layer.train()
    hidden = hidden_states()
    hidden[3, 0] = float("nan")
    layer(hidden)
    assert counted(layer)[0]["nonfinite_tokens"] == 1
