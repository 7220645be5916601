"""Batches padded on the right against one sequence at a time, and the experts that are counted in them."""

import math

import pytest
import torch
import transformers

from adamoe_dist.errors import UserError
from adamoe_dist.inference import count_experts
from adamoe_dist.inference.scoring import TokenSequence, score_sequences
from tests.inference.conftest import FAMILIES


def sequences_of(vocab_size: int, count: int = 9) -> list[TokenSequence]:
    draws = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        length = 2 + (7 * number) % 19
        ids = torch.randint(vocab_size, (length,), generator=draws).tolist()
        first = 1 + number % (length - 1)
        made.append(TokenSequence(tuple(ids), first, (number % 3) * first // 2))
    return made


def slow_scores(model, sequence: TokenSequence) -> list[float]:
    """One token at a time, from whole softmaxes in fp64, without padding, mask or cache."""
    found = []
    for position in range(sequence.first_scored, len(sequence.ids)):
        logits_V = model(torch.tensor([sequence.ids[:position]])).logits[0, -1].double()
        found.append(math.log(torch.softmax(logits_V, 0)[sequence.ids[position]].item()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_one_at_a_time(opened_models, family: str, batch_size: int) -> None:
    opened = opened_models[family]
    sequences = sequences_of(len(opened.tokenizer))
    seen = []
    scores = score_sequences(opened, sequences, batch_size, on_scored=seen.append)
    assert sum(seen) == len(sequences)
    for sequence, score in zip(sequences, scores, strict=True):
        expected = slow_scores(opened.model, sequence)
        assert score.log_likelihoods.tolist() == pytest.approx(expected, abs=2e-4)
        greedy = opened.model(torch.tensor([sequence.ids])).logits[0].argmax(1)
        targets = torch.tensor(sequence.ids[sequence.first_scored :])
        assert score.is_greedy == bool((greedy[sequence.first_scored - 1 : -1] == targets).all())


def slow_selections(opened, ids: tuple[int, ...]) -> list[list[set[int]]]:
    """The true experts of each token by layer, from the router logits that the model itself returns."""
    outputs = opened.model(torch.tensor([ids]), output_router_logits=True)
    config = opened.model.config
    num_true = getattr(config, "num_local_experts", None) or config.num_experts
    top_k = config.num_experts_per_tok
    return [
        [{column for column in row.topk(top_k).indices.tolist() if column < num_true} for row in logits_TA]
        for logits_TA in outputs.router_logits
    ]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "adamoe"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_named_token_is_counted_once_and_padding_never(opened_models, family: str, batch_size: int) -> None:
    opened = opened_models[family]
    sequences = sequences_of(len(opened.tokenizer))
    with count_experts(opened.model) as use:
        score_sequences(opened, sequences, batch_size, use)
    report = use.report(opened.reference_top_k)
    chosen: list[list[set[int]]] = []
    for sequence in sequences:
        by_layer = slow_selections(opened, sequence.ids[:-1])
        chosen = chosen or [[] for _ in by_layer]
        for layer, selections in enumerate(by_layer):
            chosen[layer].extend(selections[sequence.first_counted :])
    assert len(report["layers"]) == len(chosen) == (1 if family == "qwen3_moe" else 2)
    top_k = opened.model.config.num_experts_per_tok
    for layer, selections in zip(report["layers"], chosen, strict=True):
        load = sum(map(len, selections)) / len(selections)
        assert layer["tokens"] == len(selections) == report["tokens"]
        assert layer["true_experts_per_token"] == pytest.approx(load)
        assert layer["null_share"] == pytest.approx(1 - load / top_k)
        assert layer["all_null_share"] == pytest.approx(sum(not one for one in selections) / len(selections))
        counts = [sum(expert in one for one in selections) for expert in range(len(layer["expert_counts"]))]
        assert layer["expert_counts"] == counts
    assert (report["null_share"] > 0) == (family == "adamoe")
    load = sum(layer["true_experts_per_token"] for layer in report["layers"]) / len(report["layers"])
    assert report["true_experts_per_token"] == pytest.approx(load)
    reference = 2 if family == "adamoe" else top_k
    assert report["expert_flops_saved"] == pytest.approx(1 - load / reference)


@pytest.mark.parametrize(("family", "num_null"), [("DeepseekV3", 0), ("LongcatFlash", 3)])
def test_routers_of_other_families_are_counted(family: str, num_null: int) -> None:
    """They score in ways of their own: the reference are the indices that they return."""
    shape = {
        "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4,
    }  # fmt: skip
    own = {
        "DeepseekV3": {
            "num_hidden_layers": 1, "first_k_dense_replace": 0, "intermediate_size": 32, "moe_intermediate_size": 16,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        },
        "LongcatFlash": {
            "num_layers": 1, "zero_expert_num": 3, "moe_topk": 2, "head_dim": 4, "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**shape, **own[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    [router] = [one for name, one in model.named_modules() if type(one).__name__ == f"{family}TopkRouter"]
    chosen: list[torch.Tensor] = []
    router.register_forward_hook(lambda _module, _arguments, output: chosen.append(output[2]))
    with count_experts(model) as use:
        use.mask_BS = torch.ones(2, 9, dtype=torch.bool)
        model(torch.arange(18).reshape(2, 9))
    report = use.report(2)
    true_slots = int((chosen[0] < 4).sum())
    assert report["tokens"] == 18 and report["true_experts_per_token"] == pytest.approx(true_slots / 18)
    assert report["null_share"] == pytest.approx(1 - true_slots / 36)
    assert (true_slots < 36) == (num_null > 0)
    assert report["layers"][0]["expert_counts"] == [int((chosen[0] == expert).sum()) for expert in range(4)]


def test_nothing_is_counted_after_the_context(opened_models) -> None:
    opened = opened_models["adamoe"]
    with count_experts(opened.model) as use:
        opened.model(torch.tensor([[1, 2, 3]]))  # no token was named
    use.mask_BS = torch.ones(1, 3, dtype=torch.bool)
    opened.model(torch.tensor([[1, 2, 3]]))
    assert use.report(2)["tokens"] == 0


def test_a_dense_model_has_no_experts_to_count(opened_models) -> None:
    with count_experts(opened_models["llama"].model) as use:
        pass
    assert use.report(None) is None


def test_a_batch_that_does_not_fit_is_named(opened_models) -> None:
    opened = opened_models["olmoe"]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("there is no GPU here that could be full")

    handle = opened.model.register_forward_pre_hook(full)
    try:
        with pytest.raises(UserError, match="--batch-size 4: so many sequences of up to 20 tokens do not fit"):
            score_sequences(opened, sequences_of(len(opened.tokenizer)), 4)
    finally:
        handle.remove()
