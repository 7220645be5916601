"""The model card says what is known, and of the rest that it is not."""

import pytest
import yaml

from adamoe_dist.hf.card import CardFacts, Measured, model_card, read_measured
from tests.model.layers import config_of


def facts(**changes):
    values = {
        "title": "small",
        "config": config_of({"moe": {"router": {"capacity_factor": 2.0, "target_load": 1.5}}})[0],
        "step": 0,
        "state": {"step": 0, "tokens_seen": 0, "tokenizer_fingerprint": None},
        "measured": Measured({}, {}, {}),
        "architecture": "AdaMoEForCausalLM",
        "dtype": "bfloat16",
        "parameters": 1234567,
        "brings_code": True,
    }
    return CardFacts(**{**values, **changes})


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_an_imported_model_without_a_run_says_so():
    card = model_card(facts(base_family="mixtral"))
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "adamoe"],
    }
    for words in (
        "License: not set",
        "a mixtral model whose name is not recorded",
        "Not measured",
        "No training data is recorded",
        "tokenizer: not recorded",
        "1,234,567 parameters",
        "trust_remote_code=True",
        "factor 2",
    ):
        assert words in card, words
    assert "learning rate" not in card


def test_names_and_a_licence_are_in_the_front_matter():
    card = model_card(facts(base_model="some/name", base_family="olmoe", license="apache-2.0", brings_code=False))
    matter = front_matter(card)
    assert (matter["base_model"], matter["license"]) == ("some/name", "apache-2.0")
    assert "made from some/name" in card and "trust_remote_code" not in card


def test_what_a_run_measured_ends_at_the_checkpoint(tmp_path):
    from adamoe_dist.training.writers import JsonlWriter

    lines, counts = JsonlWriter(tmp_path / "metrics.jsonl", 0), JsonlWriter(tmp_path / "routing.jsonl", 0)
    for step in (0, 10, 20):
        record = {"step": step, "validation_loss": 5.0 - step / 10, "validation_bits_per_byte": 2.0}
        if step:
            record |= {
                "lm_loss": 4.0 - step / 10,
                "true_experts_per_token": 1.5,
                "null_share": 0.5,
                "all_null_share": 0.1,
            }
            routed = {"tokens_by_true_experts": [[1, 4, 5 + step]] * 3, "tokens_by_expert": [[9, 3, 20, 2]] * 3}
            counts.write({"step": step, "layers": [0, 2, 3], **routed})
        lines.write(record)
    lines.close()
    counts.close()
    measured = read_measured(tmp_path, 15)
    assert (measured.record["step"], measured.validation["step"]) == (10, 10)
    assert measured.routing["tokens_by_true_experts"] == [[1, 4, 15]] * 3
    state = {"tokens_seen": 4096, "tokenizer_fingerprint": "ab" * 32, "data": {"datasets": []}}
    card = model_card(facts(step=10, state=state, measured=measured))
    assert "training loss 3.000" in card and "Validation loss at step 10: 4.000" in card
    top_k = facts().config.moe.top_k
    row = f"| 1.700 | {1 - 1.7 / top_k:.3f} | 0.050 | 26.5 8.8 58.8 5.9 |"
    assert all(f"| {layer} {row}" in card for layer in (0, 2, 3)) and "in step 10," in card and "learning rate" in card
    assert read_measured(tmp_path / "elsewhere", 15) == Measured({}, {}, {})


@pytest.mark.parametrize("idle", [0, 32])
def test_of_many_experts_the_busiest_and_the_idlest_are_named(idle):
    tokens = [10] * (64 - idle) + [0] * idle
    tokens[7] = 60
    routing = {"step": 5, "layers": [1], "tokens_by_true_experts": [[0, sum(tokens)]], "tokens_by_expert": [tokens]}
    card = model_card(facts(measured=Measured({"step": 5}, {}, routing)))
    assert f"1.6 at balance; most {6000 / sum(tokens):.1f} (expert 7)," in card
    assert f"{idle} of 64 without a token" in card


def test_a_layer_that_nothing_reached_and_a_run_without_counts_have_words():
    empty = {"step": 5, "layers": [1], "tokens_by_true_experts": [[7, 0]], "tokens_by_expert": [[0, 0]]}
    card = model_card(facts(measured=Measured({"step": 5}, {}, empty)))
    assert "| 1 | 0.000 | 1.000 | 1.000 | 0.0 0.0 |" in card
    assert "by layer: not measured" in model_card(facts(measured=Measured({"step": 5}, {}, {})))
