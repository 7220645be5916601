"""What lies beside exported weights: settings of generation and a card, of imported models with null experts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.convert.models import VOCAB, change_config, save
from tests.convert.tool import refusal, run

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``in``, imported from ``hf`` with a report on a text, and ``out``, its export."""
    root = tmp_path_factory.mktemp("finished")
    save(root / "hf", "olmoe")
    (root / "hf" / "LICENSE.txt").write_text("as you like")
    change_config(root / "hf", _name_or_path="models/olmoe")
    (root / "sample.txt").write_text("the a of to in ship area circle return left day word3 " * 20)
    nulls = ("--num-null-experts", "2", "--top-k", "4", "--text", str(root / "sample.txt"))
    run("import", "--from", str(root / "hf"), "--to", str(root / "in"), *nulls)
    run("export", "--from", str(root / "in"), "--to", str(root / "out"))
    return root


def test_the_card_claims_no_name_that_nobody_gave(finished: Path, tmp_path: Path) -> None:
    card = (finished / "out" / "README.md").read_text()
    assert "base_model" not in card and "a model of family olmoe that its configuration calls `models/olmoe`" in card
    assert "License: not set; the terms of the model that it was made from are in [LICENSE.txt](LICENSE.txt)" in card
    run("export", "--from", str(finished / "in"), "--to", str(tmp_path / "out"), "--base-model", "some/olmoe")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "some/olmoe"' in card and "It was made from some/olmoe." in card
    for option in ("--license", "--base-model"):
        line = refusal("export", "--from", str(finished / "in"), "--to", str(tmp_path / "no"), option, "a\nb")
        assert f"{option} 'a\\nb'" in line and line.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_the_card_has_what_a_text_showed_before_training(finished: Path) -> None:
    report = json.loads((finished / "in" / "load_report.json").read_text())
    first = report["layers"][0]
    card = (finished / "out" / "README.md").read_text()
    assert "of `sample.txt` before any training" in card and "Not measured" not in card
    assert f"| 0 | {first['true_experts_per_token']:.3f} | {first['null_share']:.3f} | " in card


@pytest.mark.end_to_end
def test_the_code_of_the_card_runs(finished: Path, tmp_path: Path) -> None:
    card = (finished / "out" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=finished / "out", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() and "transformers >= 5" in card
