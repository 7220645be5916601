"""Outputs of identity and constant experts against one loop over tokens and experts."""

import pytest
import torch

from adamoe_dist.routing import NullExperts, select
from tests.routing.examples import distinct_logits

T, H = 9, 6


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module_of(constants):
    module = NullExperts(constants, H, torch.nn.init.normal_, torch.float64, sequence_parallel=True)
    if constants:
        with torch.no_grad():
            module.constant.copy_(draw(constants, H, seed=3))
    return module


def slow_output(tokens, weights, module, identities):
    """Sum over experts of weight x output, one expert of one token at a time."""
    rows = []
    for token, of_token in zip(tokens, weights, strict=True):
        row = torch.zeros(H, dtype=torch.float64)
        for column, weight in enumerate(of_token):
            if column < identities:
                row = row + weight * token
            else:
                mixture = module.mixture_weight[column - identities]
                first, second = torch.softmax(torch.stack(((mixture[0] * token).sum(), (mixture[1] * token).sum())), 0)
                row = row + weight * (first * token + second * module.constant[column - identities])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(("identities", "constants"), [(1, 0), (3, 0), (0, 1), (0, 3), (2, 2)])
def test_output_and_gradients_equal_the_loop(identities, constants):
    torch.manual_seed(0)
    module = module_of(constants)
    experts = 5 + 1 + identities + constants
    tokens, logits = draw(T, H, seed=1), distinct_logits(T, experts, seed=2)
    results = []
    for function in (lambda x, w: module(x, w), lambda x, w: slow_output(x, w, module, identities)):
        module.zero_grad()
        x, scores = tokens.clone().requires_grad_(), logits.clone().requires_grad_()
        chosen = select(scores, 5, 4, "true_experts", num_with_output=identities + constants)
        assert chosen.null_probs_TW.shape == (T, identities + constants) and (chosen.null_probs_TW > 0).any()
        output = function(x, chosen.null_probs_TW)
        (output * draw(T, H, seed=4)).sum().backward()
        results.append([output, x.grad, scores.grad, *[p.grad.clone() for p in module.parameters()]])
    for ours, slow in zip(*results, strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-14)
        assert ours.abs().max() > 1e-3


def test_a_token_that_selects_none_gets_exactly_zero_and_parameters_a_gradient():
    module = module_of(2)
    output = module(draw(T, H, seed=1), torch.zeros(T, 3, dtype=torch.float64))
    assert output.eq(0).all()
    output.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in module.parameters())


def test_a_constant_expert_starts_near_half_of_an_identity_and_learns_at_once():
    module = NullExperts(3, H, lambda tensor: torch.nn.init.normal_(tensor, std=0.02), torch.float32, False)
    tokens, weights = draw(T, H, seed=1).float(), torch.full((T, 3), 1 / 3)
    output = module(tokens, weights)
    torch.testing.assert_close(output, tokens / 2, rtol=0.1, atol=0.0)
    (output * draw(T, H, seed=2)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-3 for parameter in module.parameters())


def test_identity_experts_alone_have_no_parameters_and_marks_are_set_on_the_others():
    assert not list(module_of(0).parameters())
    assert [parameter.sequence_parallel for parameter in module_of(2).parameters()] == [True, True]


def test_no_tensor_has_an_axis_for_experts_beside_the_hidden_one():
    module = NullExperts(4, 64, torch.nn.init.normal_, torch.float32, False)
    tokens = torch.randn(128, 64, requires_grad=True)
    weights = torch.rand(128, 6, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        module(tokens, weights)
    assert max(sizes) <= 128 * 64


def test_low_precision_tokens_stay_low_precision():
    module = NullExperts(2, 64, torch.nn.init.normal_, torch.bfloat16, False)
    assert module(torch.randn(4, 64).bfloat16(), torch.rand(4, 3)).dtype == torch.bfloat16
