"""The model card says what is known, and of the rest that it is not."""

import pytest
import yaml

from adamoe_dist.hf.card import model_card
from adamoe_dist.hf.card_facts import CardFacts
from adamoe_dist.hf.run_facts import Measured, data_sizes, read_measured, run_of
from tests.model.layers import config_of


def facts(**changes):
    values = {
        "title": "small",
        "config": config_of({"moe": {"router": {"capacity_factor": 2.0, "target_load": 1.5}}})[0],
        "step": 0,
        "state": {"step": 0, "tokens_seen": 0, "tokenizer_fingerprint": None},
        "measured": Measured(),
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
        "a model of family mixtral whose name is not recorded",
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
    for name in ("metrics.jsonl", "routing.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 12, "lm_lo')  # a full disk, or a run that was killed
    measured = read_measured(tmp_path, 15)
    assert (measured.record["step"], measured.validation["step"]) == (10, 10)
    assert measured.routing["tokens_by_true_experts"] == [[1, 4, 15]] * 3
    state = {"tokens_seen": 4096, "tokenizer_fingerprint": "ab" * 32, "data": {"datasets": []}}
    card = model_card(facts(step=10, state=state, measured=measured))
    assert "training loss 3.000" in card and "Validation loss at step 10: 4.000" in card
    top_k = facts().config.moe.top_k
    row = f"| 1.700 | {1 - 1.7 / top_k:.3f} | 0.050 | 26.5 8.8 58.8 5.9 |"
    assert all(f"| {layer} {row}" in card for layer in (0, 2, 3)) and "in step 10," in card and "learning rate" in card
    assert read_measured(tmp_path / "elsewhere", 15) == Measured() == read_measured(None, 15)


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


def test_a_run_is_that_of_the_checkpoints_in_its_own_directory_with_its_own_model(tmp_path):
    config, other = config_of({})[0], config_of({"moe": {"top_k": 2}})[0]
    run = tmp_path / "run"
    run.mkdir()
    own, copy = run / "checkpoints" / "iter_0000010", run / "more" / "iter_0000010"
    assert run_of(own, config) is None
    (run / "config.yaml").write_text(config.to_yaml())
    assert run_of(own, config) == run
    assert run_of(copy, config) is None and run_of(own, other) is None
    (run / "config.yaml").write_text("moe: [")
    assert run_of(own, config) is None


def test_the_settings_of_a_run_and_the_sizes_of_its_data_are_in_tables(tmp_path):
    import hashlib
    import json

    about = {
        "format_version": 1,
        "tokenizer_fingerprint": "t",
        "vocab_size": 300,
        "eod_id": 0,
        "documents": 1234,
        "tokens": 567890,
        "bytes": 9,
        "unigram_entropy": 1.0,
        "content_sha256": "c",
        "sources": ["x"],
    }
    for ending, content in ((".bin", ""), (".idx", ""), (".json", json.dumps(about))):
        (tmp_path / f"text_train{ending}").write_text(content)
    mark = hashlib.sha256(b"c:t:0").hexdigest()
    sets = [{"prefix": str(tmp_path / "text_train"), "fingerprint": one, "weight": "1/2"} for one in (mark, "f" * 64)]
    state = {"tokens_seen": 4096, "tokenizer_fingerprint": "ab" * 32, "data": {"datasets": sets}}
    assert data_sizes(state) == {mark: (1234, 567890)}
    environment = {"adamoe_dist": "0.9", "python": "3.11", "packages": {"torch": "2.13.0", "absent": None}}
    card = model_card(
        facts(
            step=10,
            state=state,
            data_sizes=data_sizes(state),
            measured=Measured(environment=environment),
            layout={"world_size": 4, "tensor": 2, "precision": "bfloat16"},
        )
    )
    for words in (
        "share 1/2, 1,234 documents, 567,890 tokens",
        "| versions | adamoe_dist 0.9, python 3.11, torch 2.13.0 |",
        "| layout | 4 ranks, tensor 2, ZeRO stage",
        "| precision | bfloat16 |",
        "| optimizer | adamw, betas 0.9 and 0.95, weight decay",
        "| learning rate | ",
        "| batch | ",
        "It continues text.",
    ):
        assert words in card, words
    assert card.count("documents") == 1
    sets[0]["prefix"] = "examples.jsonl"
    assert "fine-tuned on examples, with loss on the completions" in model_card(facts(step=10, state=state))
