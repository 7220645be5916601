"""Null experts added to a trained model: its output at the first step, by how they are added."""

import pytest
import torch

from tests.distributed.cases import merged, tokens_of
from tests.model.layers import model_of

SMALL = {
    "model": {"num_layers": 2, "sequence_length": 16, "init_std": 0.15},
    "moe": {
        "num_null_experts": 0,
        "top_k": 2,
        "shared_expert_hidden_size": 24,
        "router": {"balance": {"type": "none"}, "z_loss_coefficient": 0.0},
    },
}


def with_null_experts(original, moe, bias):
    """The original's weights among null experts; ``bias`` is what the true experts' selection starts at."""
    model = model_of(merged(SMALL, {"moe": {"num_null_experts": 8, **moe}}))
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected and all("router.null_weight" in name or "expert_bias" in name for name in missing)
    for layer in model.moe_layers:
        if bias is not None:
            layer.router.expert_bias.fill_(bias)
    return model


@pytest.mark.parametrize(("before", "after"), [("true_experts", "true_experts"), ("none", "all_true")])
@pytest.mark.parametrize("null_init", ["copy", "shared", "random"])
def test_a_bias_of_one_keeps_the_output_whatever_the_null_rows(before, after, null_init):
    """But for the rounding of the router's product, which has more columns."""
    original = model_of(merged(SMALL, {"moe": {"router": {"normalize": before}}}))
    router = {"normalize": after, "null_init": null_init, "target_load": 1.2}
    adapted = with_null_experts(original, {"router": merged(SMALL["moe"]["router"], router)}, 1.0)
    tokens = tokens_of(0, 2, 16)[:, :-1]
    torch.testing.assert_close(adapted.logits(tokens), original.logits(tokens), rtol=1e-5, atol=1e-5)
    without = with_null_experts(original, {"router": merged(SMALL["moe"]["router"], router)}, 0.0)
    assert not torch.allclose(without.logits(tokens), original.logits(tokens), atol=1e-3)
    if before == "none":  # the softmax over all n + m takes a part of every weight
        router["normalize"] = "none"
        diluted = with_null_experts(original, {"router": merged(SMALL["moe"]["router"], router)}, 1.0)
        assert not torch.allclose(diluted.logits(tokens), original.logits(tokens), atol=1e-3)


@pytest.mark.parametrize("router", [{}, {"target_load": 3.0}])
def test_experts_that_are_all_alike_give_the_same_at_any_load_but_none(router):
    """As after upcycling: the weights sum to 1 wherever a token has a true expert."""
    original = model_of(SMALL)
    for layer in original.moe_layers:
        for weight in (layer.experts.weight1, layer.experts.weight2):
            weight.data.copy_(weight.data[:1].expand_as(weight))
    more = {"top_k": 10, "router": merged(SMALL["moe"]["router"], router)}  # 10 slots and 8 null experts
    adapted = with_null_experts(original, more, None)
    tokens = tokens_of(0, 2, 16)[:, :-1]
    torch.testing.assert_close(adapted.logits(tokens), original.logits(tokens), rtol=1e-5, atol=1e-5)
