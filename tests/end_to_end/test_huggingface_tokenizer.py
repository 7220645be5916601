"""A run on a Hugging Face tokenizer, from text to a model that transformers generates with."""

import sys
from pathlib import Path

import pytest
import torch

from tests.data.hf_tokenizers import write_bpe
from tests.end_to_end.conftest import REPOSITORY, metrics_of, one_process, run_command


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
    for tokens, weights in validation_batches(dataset, 4, 0, 1, 64):
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
