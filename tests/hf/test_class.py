"""What transformers expects of a class: caches, masks, checkpointing, losses of a trainer, saving."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adamoe_dist.hf.routing_adamoe import ranked_top_k, select

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 6,
    "num_null_experts": 4,
    "moe_intermediate_size": 24,
    "initializer_range": 0.3,
    "num_identity_experts": 1,
    "gating_residual": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "router_z_loss_coef": 0.01,
}


def model_of(**changes):
    from adamoe_dist.hf import AdaMoEConfig, AdaMoEForCausalLM

    torch.manual_seed(5)
    model = AdaMoEForCausalLM(AdaMoEConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "residual" in name or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_of(batch=2, length=12):
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_is_generation_without(attention):
    model = model_of().eval()
    model.set_attn_implementation(attention)
    made = [
        model.generate(tokens_of(), max_new_tokens=12, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*made) and made[0].shape[1] > 12
    tokens = tokens_of(length=10)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :6], use_cache=True)
        second = model(tokens[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_changes_nothing(attention):
    model = model_of().eval()
    model.set_attn_implementation(attention)
    short, long = tokens_of(1, 5), tokens_of(1, 9)
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
    assert together[0, 9 : 4 + alone.shape[1]].tolist() == alone[0, 5:].tolist()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(batch, attention_mask=mask, position_ids=positions).logits[0, 4:]
        torch.testing.assert_close(logits, model(short).logits[0], rtol=1e-4, atol=1e-5)


def test_attention_implementations_agree():
    model = model_of(qk_norm="all", qkv_bias=True, head_dim=10).eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    logits = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(tokens_of(), attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-4, atol=1e-5)
    weights = model(tokens_of(), output_attentions=True).attentions
    assert len(weights) == 3 and weights[0].shape == (2, 4, 12, 12)


def test_slots_of_null_experts_cost_nothing():
    """The products of a layer are those of its pairs of a token and a true expert, counted by torch."""
    model = model_of(gating_residual=False, num_identity_experts=0).eval()
    block = model.model.layers[0].mlp
    tokens_TH = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    _, routes = block.router(tokens_TH, None, None)
    pairs = int(routes.selected_TA[:, :6].sum())
    assert 0 < pairs < 400 * 3 and (routes.selected_TA[:, :6].sum(dim=1) == 0).any(), "some tokens have null slots only"
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        output_TH = block.experts(tokens_TH, routes.weights_TE, routes.selected_TA[:, :6])
    assert counted.get_total_flops() == pairs * 2 * 3 * 32 * 24
    assert output_TH[routes.selected_TA[:, :6].sum(dim=1) == 0].eq(0).all()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        block.experts(tokens_TH, routes.weights_TE * 0, torch.zeros(400, 6, dtype=torch.bool))
    assert counted.get_total_flops() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = model_of(router_aux_loss_coef=0.5).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens_of(), labels=tokens_of(), output_router_logits=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_every_weight_gets_a_gradient_even_without_a_row():
    """With weights 0 all logits tie and true experts win; a large null row takes every slot."""
    model = model_of(normalize="none", gating_residual=False).train()
    model(tokens_of(), labels=tokens_of(), output_router_logits=True).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model = model_of(gating_residual=False, num_identity_experts=0).train()
    block = model.model.layers[0].mlp
    block(torch.randn(1, 4, 32), None, torch.zeros(4, dtype=torch.bool))[0].sum().backward()
    assert block.experts.gate_up_proj.grad.eq(0).all() and block.experts.down_proj.grad.eq(0).all()


def test_the_loss_of_a_step_is_that_of_its_micro_batches():
    """Under num_items_in_batch the micro-batches' losses add up, those of the routers weighed by their labels."""
    model = model_of(router_aux_loss_coef=0.3).train()
    tokens = tokens_of(4)
    labels = tokens.clone()
    labels[0, :7] = -100
    count = int((labels[:, 1:] != -100).sum())
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        parts.append(
            model(tokens[rows], labels=labels[rows], output_router_logits=True, num_items_in_batch=torch.tensor(count))
        )
    plain = model(tokens, labels=labels)
    assert count == 5 + 33
    shares = [5 / count, 33 / count]
    routers = sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), plain.loss + routers)
    assert plain.aux_loss is None and plain.router_logits is None
    assert [logits.shape for logits in parts[1].router_logits] == [(36, 10)] * 3


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "target_load": 1.2, "num_constant_experts": 2}])
def test_it_is_saved_and_found_by_the_auto_classes(changes, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model = model_of(**changes).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    same = {"dtype": "float32", "_name_or_path": str(tmp_path)}
    assert type(again) is type(model) and again.config.to_dict() == {**model.config.to_dict(), **same}
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tmp_path)(tokens_of()).last_hidden_state
        torch.testing.assert_close(again.lm_head(hidden), model(tokens_of()).logits)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings == model.config.tie_word_embeddings
    outputs = model(tokens_of(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4 and torch.equal(outputs.hidden_states[-1], hidden)


def test_a_selection_bias_stays_fp32():
    model = model_of(target_load=1.2)
    model.model.layers[0].mlp.router.expert_bias.fill_(1 / 3)
    assert model.bfloat16().model.layers[0].mlp.router.expert_bias[0] == torch.tensor(1 / 3)


def test_ties_go_to_the_lowest_column():
    logits_TA = torch.tensor([[0.0, 2.0, -0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    for dtype in (torch.float32, torch.float64):
        assert ranked_top_k(logits_TA.to(dtype), 3).tolist() == [[1, 3, 4], [0, 1, 2]]
    assert select(logits_TA, 3, 2, "true_experts").selected_TA.tolist()[0] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"normalize": "some"}, "normalize='some' is none of"),
        ({"qk_norm": "key"}, "qk_norm='key'"),
        ({"num_experts_per_tok": 11}, "not between 1 and the 10"),
        ({"num_constant_experts": 4}, "more than num_null_experts=4"),
        ({"normalize": "all_true"}, "null experts without an output"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
    ],
)
def test_configurations_that_no_model_has_are_refused(changes, problem):
    from adamoe_dist.hf import AdaMoEConfig

    with pytest.raises(ValueError, match=problem):
        AdaMoEConfig(**{**SMALL, **changes})


def test_routing_is_that_of_training_in_every_combination():
    """Weights, choices, losses and their gradients beside the functions that training uses, in float64."""
    from adamoe_dist import routing
    from adamoe_dist.hf.routing_adamoe import balance_loss, z_loss

    draws = torch.Generator().manual_seed(2)
    real_T = torch.rand(50, generator=draws) > 0.2
    for score in ("softmax", "sigmoid"):
        for normalize in ("true_experts", "all_selected", "all_true", "none"):
            if normalize == "all_true" and score == "sigmoid":
                continue
            for with_output in (0, 2) if normalize != "all_true" else (0,):
                for bias_E in (None, 0.3 * torch.randn(6, generator=draws)):
                    logits = torch.randn(50, 10, generator=draws, dtype=torch.float64)
                    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
                    mine = select(ours, 6, 3, normalize, score, bias_E, with_output, real_T)
                    yours = routing.select(
                        theirs,
                        6,
                        3,
                        normalize,
                        ~real_T,
                        score_function=score,
                        bias_E=bias_E,
                        num_with_output=with_output,
                    )
                    assert torch.equal(mine.selected_TA, yours.selected_TA)
                    torch.testing.assert_close(mine.weights_TE, yours.probs_TE)
                    torch.testing.assert_close(mine.null_weights_TW, yours.null_probs_TW)
                    cotangent = torch.randn(50, 6, generator=draws, dtype=torch.float64)
                    my_sum, your_sum = (mine.weights_TE * cotangent).sum(), (yours.probs_TE * cotangent).sum()
                    for kind in ("null_averaged", "grouped", "switch"):
                        share = 0.3 if kind == "grouped" else None
                        my_sum = my_sum + balance_loss(ours, mine.selected_TA, 6, kind, score, share, real_T)
                        your_sum = your_sum + routing.balance_loss(
                            theirs, yours, kind, ~real_T, score_function=score, target_null_share=share
                        )
                    my_sum = my_sum + z_loss(ours, real_T)
                    your_sum = your_sum + routing.z_loss(theirs, ~real_T)
                    torch.testing.assert_close(my_sum, your_sum)
                    my_sum.backward()
                    your_sum.backward()
                    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_trainer_of_transformers_trains_and_evaluates(tmp_path):
    from transformers import Trainer, TrainingArguments

    sets = [{"input_ids": row, "labels": row} for row in tokens_of(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    seen = []
    trainer = Trainer(
        model_of(),
        arguments,
        train_dataset=sets,
        eval_dataset=sets,
        compute_metrics=lambda found: seen.append(found.predictions.shape) or {},
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        expected = trainer.model(tokens_of(4), labels=tokens_of(4)).loss
    assert loss == pytest.approx(float(expected), rel=1e-4) and seen == [(4, 12, 96)]
