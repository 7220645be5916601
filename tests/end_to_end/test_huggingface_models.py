"""A model of transformers goes on training here and goes back, as a user does it."""

import sys
from pathlib import Path

import pytest

from tests.convert import models
from tests.end_to_end.conftest import REPOSITORY, Finished, metrics_of, one_process, run_command

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


def tool(name: str, workspace: Path, *arguments: str) -> Finished:
    return run_command([sys.executable, str(REPOSITORY / "tools" / name), *arguments], workspace)


def test_imported_trained_and_back(workspace: Path) -> None:
    """Its own tokenizer cuts the text; trained a few steps on one process, it is still a Mixtral, with its files."""
    from transformers import AutoModelForCausalLM

    models.save(workspace / "mixtral", "mixtral", vocab_size=128)
    done = tool("convert_checkpoint.py", workspace, "import", "--from", "mixtral", "--to", "imported")
    assert done.returncode == 0, done.stderr
    cut = ["--input", "text", "--tokenizer", "imported/huggingface", "--output", "words", "--workers", "1"]
    done = tool("prepare_data.py", workspace, *cut)
    assert done.returncode == 0, done.stderr
    settings = [
        "data.train=[{path: words_train}]",
        "model.sequence_length=32",
        "train.steps=8",
        "optimizer.learning_rate=0.01",
        "train.global_batch_size=4",
        "train.precision=fp32",
        "monitor.log_interval=1",
        "monitor.sample_tokens=0",
    ]
    trained = run_command(one_process("--config", "imported/config.yaml", *settings, "run.dir=runs/mixtral"), workspace)
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-3000:]
    first, *_, last = metrics_of(workspace / "runs" / "mixtral")
    assert first["true_experts_per_token"] == 2.0 and last["lm_loss"] < first["lm_loss"]
    done = tool("convert_checkpoint.py", workspace, "export", "--from", "runs/mixtral", "--to", "back")
    assert done.returncode == 0 and "MixtralForCausalLM" in done.stdout, done.stderr
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (workspace / "back" / name).read_bytes() == (workspace / "mixtral" / name).read_bytes(), name
    before, after = (models.tensors_of(workspace / name) for name in ("mixtral", "back"))
    assert before.keys() == after.keys()
    assert sum(bool((before[name] != after[name]).any()) for name in before) > len(before) // 2
    AutoModelForCausalLM.from_pretrained(workspace / "back")
    done = tool("convert_checkpoint.py", workspace, "verify", "--hf", "back", "--megatron", "runs/mixtral")
    assert done.returncode == 0 and "ok: the same model" in done.stdout, done.stderr
