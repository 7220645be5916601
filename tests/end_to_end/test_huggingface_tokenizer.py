"""A run on a Hugging Face tokenizer, from text to a model that transformers generates with."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.data.hf_tokenizers import write_bpe
from tests.end_to_end.conftest import REPOSITORY, metrics_of, one_process, run_command

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def run(workspace) -> Path:
    write_bpe(workspace / "bpe")
    prepare = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), "--input", "text", "--tokenizer", "bpe"]
    done = run_command([*prepare, "--output", "bpe_corpus", "--workers", "2"], workspace)
    assert done.returncode == 0, done.stderr
    data = [
        "data.tokenizer=bpe",
        "data.train=[{path: bpe_corpus_train}]",
        "data.validation=[{path: bpe_corpus_validation}]",
        "run.dir=runs/bpe",
        "train.steps=20",
        "monitor.sample_tokens=8",
    ]
    done = run_command(one_process("--config", "small.yaml", *data), workspace)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "sample, continuing" in done.stdout
    return workspace / "runs" / "bpe"


def test_it_trains_and_keeps_its_tokenizer(run):
    records = metrics_of(run)
    losses = [record["lm_loss"] for record in records if "lm_loss" in record]
    assert losses[-1] < losses[0]
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == (
        run.parents[1] / "bpe" / "tokenizer.json"
    ).read_bytes()


def test_the_run_opens_in_transformers_and_gives_its_validation_loss(run, monkeypatch):
    from adamoe_dist.data import TokenDataset, validation_batches
    from adamoe_dist.hf import model_from_checkpoint, tokenizer_from_checkpoint

    monkeypatch.chdir(run.parents[1])
    model, tokenizer = model_from_checkpoint(run), tokenizer_from_checkpoint(run)
    assert tokenizer.eos_token_id == 1 and not model.training
    dataset = TokenDataset("bpe_corpus_validation", 32, 0, shuffle=False)
    total = samples = 0.0
    for batch, weights in validation_batches(dataset, 4, 0, 1, 64):
        tokens = batch.tokens
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        total += float((losses.mean(dim=1) * weights).sum())
        samples += float(weights.sum())
    measured = [record["validation_loss"] for record in metrics_of(run) if "validation_loss" in record]
    assert total / samples == pytest.approx(measured[-1], abs=1e-4)
    prompt = tokenizer("The ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0])
    assert text.startswith("The ")


def test_its_export_has_a_card_of_what_the_run_measured(run, tmp_path):
    from adamoe_dist.data import Tokenizer
    from tests.hf.exports import export

    plan = export(run, tmp_path / "hf")
    assert plan.family.model_type == "adamoe"
    assert Tokenizer.load(tmp_path / "hf").fingerprint == Tokenizer.load(run / "tokenizer").fingerprint
    card = (tmp_path / "hf" / "README.md").read_text()
    last = [record for record in metrics_of(run) if "validation_loss" in record][-1]
    head = card.split("---")[1]
    assert 'library_name: "transformers"' in head and "license: not set" in head and "base_model" not in head
    assert f"- tokens seen: {last['tokens_seen']:,} in 20 steps" in card and "`bpe_corpus_train`" in card
    assert f"Validation loss at step 20: {last['validation_loss']:.3f} nats" in card
    assert f"{last['true_experts_per_token']:.3f} true experts a token" in card
    rows = [line for line in card.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    loads = [float(row.split("|")[2]) for row in rows]
    assert len(rows) == 2 and sum(loads) / 2 == pytest.approx(last["true_experts_per_token"], abs=2e-3)
    assert "2406.13233" in card and "not measured" not in card.lower()
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (
        settings["eos_token_id"] == 1
        and settings["suppress_tokens"][0] == 300
        and settings["suppress_tokens"][-1] == 383
    )
