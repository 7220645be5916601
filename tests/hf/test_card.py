"""The model card says what is known, and of the rest that it is not."""

import yaml

from adamoe_dist.hf.card import CardFacts, Measured, model_card, read_measured
from tests.model.layers import config_of


def facts(**changes):
    values = {
        "title": "small",
        "config": config_of({"moe": {"router": {"capacity_factor": 2.0, "target_load": 1.5}}})[0],
        "step": 0,
        "state": {"step": 0, "tokens_seen": 0, "tokenizer_fingerprint": None},
        "measured": Measured({}, {}, []),
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
    from adamoe_dist.monitoring import TensorBoardWriter
    from adamoe_dist.training.writers import JsonlWriter

    lines, board = JsonlWriter(tmp_path / "metrics.jsonl", 0), TensorBoardWriter(tmp_path / "tensorboard", 0)
    for step in (0, 10, 20):
        record = {"step": step, "validation_loss": 5.0 - step / 10, "validation_bits_per_byte": 2.0}
        if step:
            record |= {
                "lm_loss": 4.0 - step / 10,
                "true_experts_per_token": 1.5,
                "null_share": 0.5,
                "all_null_share": 0.1,
            }
        lines.write(record)
        shares = {"true_experts_per_token": 1.0 + step, "null_share": 0.5, "all_null_share": 0.1}
        shares["expert_max_over_mean"] = 1.2
        scalars = {f"layers/{name}/{layer:02d}": value for layer in range(3) for name, value in shares.items()}
        board.write_scalars(scalars if step else {}, step)
    lines.close()
    board.close()
    measured = read_measured(tmp_path, 15)
    assert (measured.record["step"], measured.validation["step"]) == (10, 10)
    assert [layer["true_experts_per_token"] for layer in measured.layers] == [11.0] * 3
    state = {"tokens_seen": 4096, "tokenizer_fingerprint": "ab" * 32, "data": {"datasets": []}}
    card = model_card(facts(step=10, state=state, measured=measured))
    assert "training loss 3.000" in card and "Validation loss at step 10: 4.000" in card
    assert card.count("| 11.000 | 0.500 | 0.100 | 1.200 |") == 3 and "learning rate" in card
    assert read_measured(tmp_path / "elsewhere", 15) == Measured({}, {}, [])
