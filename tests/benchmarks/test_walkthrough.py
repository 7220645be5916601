"""The walkthrough from a GGUF file to an evaluated AdaMoE model, in small, stopped and continued."""

import json
import random
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.benchmarks.commands import REPOSITORY, benchmark
from tests.benchmarks.tiny_gguf import write_gguf

COLOURS = ("red", "blue", "green", "white", "black")
KEYS = (
    "model.sequence_length=32",
    "monitor.log_interval=1",
    "train.global_batch_size=8",
    "optimizer.learning_rate=0.01",
)


def question(number: int, draws: random.Random) -> dict[str, Any]:
    choices, answer = draws.sample(COLOURS, 4), draws.randrange(4)
    context = f"Question: say {choices[answer]}\nAnswer:"
    return {"id": str(number), "context": context, "choices": choices, "answer": answer}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    directory, draws = tmp_path_factory.mktemp("walkthrough"), random.Random(0)
    questions = [question(number, draws) for number in range(48)]
    examples = [{"prompt": q["context"], "completion": " " + q["choices"][q["answer"]]} for q in questions[:32]]
    for name, lines in (("train", examples), ("test", questions[32:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_gguf(directory / "tiny.gguf", [example["prompt"] + example["completion"] for example in examples])
    return directory


def walk(inputs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    given = ["--gguf", inputs / "tiny.gguf", "--train", inputs / "train.jsonl", "--tests", inputs / "test.jsonl"]
    return benchmark(
        "walkthrough.py", "--directory", str(inputs / "out"), *map(str, given), *more, "--set", *KEYS, timeout_s=900
    )


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.distributed
def test_from_gguf_to_a_table_and_continued(inputs):
    first = walk(inputs, "--num-null-experts", "0")
    assert first.returncode == 2 and len(first.stderr.split("error: ")) == 2, first.stderr[-2000:]
    done = walk(inputs, "--json", str(inputs / "numbers.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    numbers = json.loads((inputs / "numbers.json").read_text())
    used = {name: result["checkpoint"]["tasks"] for name, result in numbers.items()}
    (top2,), (adamoe,) = ([task["expert_use"] for task in used[name].values()] for name in ("top2", "adamoe"))
    assert top2["true_experts_per_token"] == 2 and 0.5 < adamoe["true_experts_per_token"] < 3
    assert AutoConfig.from_pretrained(inputs / "out" / "top2").model_type == "mixtral"
    config = json.loads((inputs / "out" / "adamoe" / "config.json").read_text())
    assert config["num_null_experts"] == 4 and config["auto_map"]
    for run in ("run_top2", "run_adamoe"):
        losses = [json.loads(line)["lm_loss"] for line in (inputs / "out" / run / "metrics.jsonl").open()]
        assert losses[-1] < losses[0]
    assert done.stdout.count("| adamoe | test (16) |") == 1
    again = walk(inputs)
    assert again.returncode == 0 and "== " not in again.stdout
    assert again.stdout[again.stdout.index("| model") :] == done.stdout[done.stdout.index("| model") :]


def test_the_page_shows_the_commands_that_are_run():
    """Each command of the page is one that the program runs: same tool, same options."""
    page = (REPOSITORY / "docs" / "walkthrough.md").read_text()
    source = (REPOSITORY / "benchmarks" / "walkthrough.py").read_text()
    commands = [
        shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()
    ]
    tools = [words for words in commands if any(word.startswith(("tools/", "launch/")) for word in words)]
    assert len(tools) == 5
    for words in tools:
        for word in words:
            if word.startswith("--"):
                assert f'"{word}"' in source, word
            if word.startswith(("tools/", "launch/")):
                assert Path(word).name in source
