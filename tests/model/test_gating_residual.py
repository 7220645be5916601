"""The gating residual: scores travel from layer to layer inside one forward pass, or it fails."""

import pytest
import torch
from megatron.core import tensor_parallel

from adamoe_dist.routing import ScoreChain
from tests.distributed.cases import tokens_of
from tests.model.layers import model_of

RESIDUAL = {"moe": {"router": {"gating_residual": True}}}


def routers_of(model):
    return [layer.router for layer in model.moe_layers]


def randomised(model):
    for number, router in enumerate(routers_of(model)[1:]):
        with torch.no_grad():
            router.gating_residual_weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(number))
    return model


def test_it_starts_as_the_model_without():
    plain, model = model_of({}).train(), model_of(RESIDUAL).train()
    extra = set(dict(model.named_parameters())) - set(dict(plain.named_parameters()))
    assert extra == {f"gpt.decoder.layers.{i}.mlp.router.gating_residual_weight" for i in (1, 2)}
    tokens = tokens_of(0, 2, 32)
    outputs = [each(tokens) for each in (plain, model)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.mean().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(model.named_parameters())[name].grad), name
    for router in routers_of(model)[1:]:
        assert router.gating_residual_weight.shape == (16, 16) and router.gating_residual_weight.grad.norm() > 0


def test_scores_and_gradients_are_those_of_the_formula():
    """Three routers on given inputs against the sums written out, in float64."""
    routers = routers_of(randomised(model_of(RESIDUAL).train()))
    inputs = [torch.randn(10, 64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    cotangents = [torch.randn(10, 16, generator=torch.Generator().manual_seed(9 + i)) for i in range(3)]
    total, seen = 0.0, []
    for router, hidden, cotangent in zip(routers, inputs, cotangents, strict=True):
        logits = router._with_residual(router.gating(hidden))
        total = total + (logits * cotangent).sum()
        seen.append(logits)
    total.backward()
    exact = [hidden.detach().double().requires_grad_() for hidden in inputs]
    rows = [torch.cat((r.weight, r.null_weight)).detach().double().requires_grad_() for r in routers]
    maps = [r.gating_residual_weight.detach().double().requires_grad_() for r in routers[1:]]
    first = exact[0] @ rows[0].T
    second = exact[1] @ rows[1].T + first @ maps[0].T
    third = exact[2] @ rows[2].T + second @ maps[1].T
    expected = (first, second, third)
    sum((logits * c.double()).sum() for logits, c in zip(expected, cotangents, strict=True)).backward()
    pairs = [*zip(seen, expected, strict=True), *((i.grad, e.grad) for i, e in zip(inputs, exact, strict=True))]
    pairs += [(r.weight.grad, row.grad[:8]) for r, row in zip(routers, rows, strict=True)]
    pairs += [(r.gating_residual_weight.grad, m.grad) for r, m in zip(routers[1:], maps, strict=True)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_it_changes_the_routing_in_training_and_evaluation_alike():
    model, tokens = randomised(model_of(RESIDUAL)), tokens_of(0, 2, 32)
    trained = model.train()(tokens)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), trained)
    assert not torch.equal(model_of({}).train()(tokens), trained)
    model.train()(tokens).mean().backward()


def test_a_recomputed_layer_fails_instead_of_training_without_its_gradient():
    model = model_of(RESIDUAL).train()
    layer = model.gpt.decoder.layers[0]
    original = layer.mlp.forward
    layer.mlp.forward = lambda x, **_: (tensor_parallel.checkpoint(lambda y: original(y)[0], False, x), None)
    with pytest.raises(AssertionError, match="recomputed"):
        model(tokens_of(0, 2, 32))


def test_scores_of_another_layer_another_batch_or_none_are_refused():
    chain, scores = ScoreChain(3), torch.zeros(4, 2)
    with pytest.raises(AssertionError, match="router 1 runs, but the scores at hand are those of router None"):
        chain.take(1, 4)
    chain.give(0, scores)
    with pytest.raises(AssertionError, match="router 1 has 5 tokens, router 0 had 4"):
        chain.take(1, 5)
    chain.give(0, scores)
    with pytest.raises(AssertionError, match="router 2 runs, but the scores at hand are those of router 0"):
        chain.take(2, 4)
    chain.give(0, scores)
    assert chain.take(1, 4) is scores
    with pytest.raises(AssertionError, match="those of router None"):
        chain.take(1, 4)
    chain.give(2, scores)
    with pytest.raises(AssertionError, match="those of router None"):
        chain.take(1, 4)


def test_a_layer_run_again_after_the_pass_fails():
    """What the backward pass of a recomputed layer would do."""
    model = model_of(RESIDUAL).train()
    model(tokens_of(0, 2, 32))
    with pytest.raises(AssertionError, match="cannot be recomputed one by one"):
        routers_of(model)[2](torch.zeros(64, 64))
