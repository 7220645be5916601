"""What lies beside exported weights: settings of generation and a card, of imported models with null experts."""

import json
from pathlib import Path

import pytest
import torch

from tests.convert.models import VOCAB, save
from tests.convert.tool import run

PADDED = 128
SUPPRESSED = list(range(VOCAB, PADDED))


def imported(root: Path, *options: str, **changes: bool) -> Path:
    save(root / "hf", "olmoe", **changes)
    run("import", "--from", str(root / "hf"), "--to", str(root / "in"), "--num-null-experts", "2", *options)
    return root / "in"


def generation(directory: Path) -> dict[str, object]:
    return json.loads((directory / "generation_config.json").read_text())


@pytest.mark.parametrize("tokenizer", [True, False])
def test_only_ids_that_a_token_may_have_are_generated(tmp_path: Path, tokenizer: bool) -> None:
    from transformers import AutoModelForCausalLM

    import adamoe_dist.hf  # noqa: F401

    checkpoint = imported(tmp_path, "--top-k", "4", tokenizer=tokenizer)
    run("export", "--from", str(checkpoint), "--to", str(tmp_path / "out"))
    before, after = generation(tmp_path / "hf"), generation(tmp_path / "out")
    assert after == before | {"suppress_tokens": SUPPRESSED} and after["eos_token_id"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.manual_seed(0)
    made = model.generate(torch.full((64, 2), 5), do_sample=True, temperature=1.0, max_new_tokens=8)
    assert int(made.max()) < VOCAB


def test_settings_are_made_where_the_model_came_without(tmp_path: Path) -> None:
    save(tmp_path / "hf", "olmoe", tokenizer=False)
    (tmp_path / "hf" / "generation_config.json").unlink()
    run("import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "in"))
    run("export", "--from", str(tmp_path / "in"), "--to", str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    run("export", "--from", str(tmp_path / "in"), "--to", str(tmp_path / "out"), "--family", "adamoe")
    made = generation(tmp_path / "out")
    assert made["eos_token_id"] == 2 and made["suppress_tokens"] == SUPPRESSED
