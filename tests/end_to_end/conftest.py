"""A small prepared corpus and a way to run the project's commands as a user does."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.nursery import Nursery

REPOSITORY = Path(__file__).resolve().parents[2]
PHASES = ("data", "forward", "backward", "pipeline", "optimizer", "other")
LAYER_PARTS = ("routing", "dispatch", "experts", "combine")
TIMES = {"step_time_s", "tokens_per_second", "model_flops_per_second", "mfu", "memory_peak_gib"}
TIMES |= {"save_stall_s", "save_write_s", *(f"time_{name}_s" for name in (*PHASES, *LAYER_PARTS, "save"))}


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines of standard error that say what was refused."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


def environment_of_commands(changes: dict[str, str]) -> dict[str, str]:
    """This process's environment with ``changes``, and this interpreter's scripts first on the path."""
    variables = {**os.environ, **changes}
    return {**variables, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"}


def run_command(
    arguments: list[str], cwd: Path, timeout_s: float = 300, environment: dict[str, str] | None = None
) -> Finished:
    """Run a command with this interpreter's scripts first on the path."""
    variables = environment_of_commands(environment or {})
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=variables)
    return Finished(done.returncode, done.stdout, done.stderr)


def deepspeed(ranks: int, *arguments: str, port: int | None = None) -> list[str]:
    extra = ["--master_port", str(port or free_port())]
    return [
        "deepspeed",
        "--num_accelerators",
        str(ranks),
        *extra,
        str(REPOSITORY / "launch" / "pretrain.py"),
        *arguments,
    ]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    extra = ["--master-port", str(free_port())]
    return ["torchrun", "--nproc-per-node", str(ranks), *extra, str(REPOSITORY / "launch" / "pretrain.py"), *arguments]


def one_process(*arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), *arguments]


def free_port() -> int:
    from tests.distributed.harness import free_port as find

    return find()


def metrics_of(run_dir: Path, drop: set[str] = TIMES) -> list[dict[str, Any]]:
    """The metrics of a run without those that time and memory set."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in drop} for line in lines]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A directory with text, a tokenizer, prepared data and a small configuration, all made by the tools."""
    root = tmp_path_factory.mktemp("workspace")
    text = root / "text"
    text.mkdir()
    for number, (_, topic) in enumerate(sorted(pydoc_data.topics.topics.items())):
        (text / f"{number:03d}.txt").write_text(topic, encoding="utf-8")
    tokenizer = [sys.executable, str(REPOSITORY / "tools" / "train_tokenizer.py")]
    prepare = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py")]
    for command in (
        [*tokenizer, "--input", "text", "--vocab-size", "512", "--output", "tokenizer"],
        [*prepare, "--input", "text", "--tokenizer", "tokenizer", "--output", "corpus", "--workers", "2"],
    ):
        done = run_command(command, root)
        assert done.returncode == 0, done.stderr
    (root / "small.yaml").write_text(SMALL)
    return root


SMALL = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, sequence_length: 32}
moe:
  expert_hidden_size: 32
  router: {z_loss_coefficient: 0.001, balance: {coefficient: 0.02, final_coefficient: 0.001}}
optimizer: {learning_rate: 0.003}
schedule: {warmup_steps: 4}
data:
  train: [{path: corpus_train}]
  validation: [{path: corpus_validation}]
  tokenizer: tokenizer
train: {steps: 40, global_batch_size: 16, micro_batch_size: 4, validation_interval: 20, validation_samples: 64}
checkpoint: {interval: 20}
monitor: {log_interval: 5}
"""


@pytest.fixture(scope="session")
def nursery(workspace) -> Iterator[Nursery]:
    nursery = Nursery(workspace, environment_of_commands({"PYTHONPATH": str(REPOSITORY)}))
    yield nursery
    nursery.close()
