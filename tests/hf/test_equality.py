"""The transformers class against the Megatron model in training, on the same weights."""

import pytest
import torch

from tests.distributed.cases import padding_of, tokens_of
from tests.hf.pairs import VARIANTS, canonical, class_gradients, pair_of


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_gradients_are_those_of_training(name):
    config, megatron, model = pair_of(VARIANTS[name])
    tokens = tokens_of(0, 3, config.model.sequence_length)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    expected = megatron.eval().logits(inputs)
    outputs = model.eval()(inputs)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.3, "logits that show nothing"

    losses = megatron.train()(tokens)
    losses.mean().backward()
    outputs = model.train()(inputs, labels=inputs, shift_labels=labels, output_router_logits=True)
    outputs.loss.backward()
    attached = outputs.aux_loss
    torch.testing.assert_close(outputs.loss - attached, losses.mean(), rtol=1e-5, atol=1e-5)
    router = config.moe.router
    assert (float(attached) > 0) == (router.balance.type != "none" or router.z_loss_coefficient > 0)
    theirs = class_gradients(config, megatron)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(ours) == set(theirs)
    for weight, gradient in theirs.items():
        assert ours[weight] is not None, weight
        scale = float(gradient.norm())
        assert float((ours[weight] - gradient).norm()) <= 1e-4 * scale + 1e-7, weight
    assert sum(float(gradient.norm()) > 1e-4 for gradient in theirs.values()) > 10


@pytest.mark.parametrize("name", ["types-residual-eq6-z", "sigmoid-types-residual-dense-grouped"])
def test_padding_goes_to_no_expert_and_counts_in_no_loss(name):
    config, megatron, model = pair_of(VARIANTS[name])
    tokens = tokens_of(1, 4, config.model.sequence_length)
    padding = padding_of(tokens)
    assert padding.any()
    losses = megatron.train()(tokens, padding)
    (losses.masked_fill(padding, 0.0).sum() / (~padding).sum()).backward()
    labels = tokens[:, 1:].masked_fill(padding, -100)
    mask = (~padding).long()
    outputs = model.train()(
        tokens[:, :-1], attention_mask=mask, labels=labels, shift_labels=labels, output_router_logits=True
    )
    outputs.loss.backward()
    for weight, gradient in class_gradients(config, megatron).items():
        ours = dict(model.named_parameters())[weight].grad
        assert float((ours - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, weight


def test_every_tensor_of_training_has_its_place():
    """All variants together have every kind of weight that the Megatron model can have."""
    kinds = set()
    for changes in VARIANTS.values():
        _, megatron, model = pair_of(changes)
        kinds |= {name.split(".layers.")[-1].partition(".")[2] or name for name in canonical(megatron)}
        assert sum(p.numel() for p in megatron.parameters()) == sum(p.numel() for p in model.parameters())
    assert {
        "mlp.router.expert_bias",
        "mlp.null_experts.constant",
        "mlp.shared_experts.gate_weight",
        "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight",
    } <= kinds
