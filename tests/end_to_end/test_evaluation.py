"""Every command of docs/evaluation.md, and lm-evaluation-harness beside our own numbers.

The two tools run in this process, which has imported torch; the harness runs as its user would run it.
"""

import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adamoe_dist.errors import UserError
from tests.end_to_end.conftest import REPOSITORY, one_process, run_command
from tests.inference.tiny import QUESTIONS, TEXT, save_model, write_lines

pytestmark = pytest.mark.end_to_end

DOCUMENT = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.S) for line in block.splitlines() if line
]
TASK = re.findall(r"```yaml\n(.*?)```", DOCUMENT, flags=re.S)
WORDS = ["blue", "a dark green", "two", "the house", "naïve café", "four", "the dog by the door", "it", "五", "the mat"]


def many_questions(count: int = 40) -> list[dict[str, Any]]:
    """Items whose contexts end in no space, as both programs take them alike."""
    made = [item for item in QUESTIONS if "question" in item]
    for number in range(count):
        choices = [WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 7)][: 2 + number % 2]
        made.append(
            {"question": f"What is {WORDS[number % 10]} of {number}?", "choices": choices, "answer": number % 2}
        )
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory, workspace) -> Path:
    """A directory with what the document's commands name: two exports, a run, text and questions."""
    root = tmp_path_factory.mktemp("evaluation")
    save_model(root / "exports" / "adaptive", "adamoe", with_chat=True)
    save_model(root / "exports" / "vanilla", "mixtral", with_bos=False)
    (root / "held_out.txt").write_text("\n".join(TEXT), encoding="utf-8")
    (root / "questions.txt").write_text("What is blue?\nAnd two?\n")
    write_lines(root / "prompts.jsonl", ["The dog", {"prompt": "Question: what is naïve?"}])
    write_lines(root / "questions.jsonl", many_questions())
    (root / "tasks").mkdir()
    run = one_process(
        "--config", "small.yaml", f"run.dir={root}/runs/adaptive", "train.steps=2", "checkpoint.interval=2"
    )
    done = run_command(run, workspace)
    assert done.returncode == 0, done.stderr
    return root


def tool(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Runs a line of the document whose command is one of the tools."""

    def run_line(line: str) -> str:
        monkeypatch.chdir(place)
        line, _, standard_input = line.partition(" < ")
        _, script, *arguments = shlex.split(line)
        if standard_input:
            monkeypatch.setattr(sys, "stdin", io.StringIO((place / standard_input).read_text()))
        tool(Path(script).stem).main(arguments)
        return capsys.readouterr().out

    return run_line


def line_of(*fragments: str) -> str:
    """The one line of the document that has all of these."""
    [line] = [line for line in COMMANDS if all(fragment in line for fragment in fragments)]
    USED.add(line)
    return line


USED: set[str] = set()


def test_generating(run) -> None:
    line = line_of("--prompt", "--max-new-tokens 40")
    first = run(line)
    assert first.strip() and run(line) == first == run(f"{line} --no-stream")
    greedy = run(line_of("--temperature 0"))
    assert re.search(
        r"\d\.\d\d true experts a token \(by layer .*\), null share .*expert FLOPs of top-2 saved\]", greedy
    )


def test_samples_of_several_prompts(run) -> None:
    line = line_of("prompts.jsonl")
    records = [json.loads(answer) for answer in run(line).splitlines()]
    assert [record["seed"] for record in records] == [7, 8, 9] * 2
    assert [record["prompt"] for record in records] == ["The dog"] * 3 + ["Question: what is naïve?"] * 3
    assert len({record["text"] for record in records}) == 6
    fewer = [json.loads(answer) for answer in run(line.replace("--num-samples 3", "--num-samples 1")).splitlines()]
    assert [record["text"] for record in fewer] == [records[0]["text"], records[3]["text"]]


def test_a_conversation_goes_on(run, place) -> None:
    line = line_of("--interactive", "--chat")
    assert run(line).strip()
    line = line.replace(" --chat", " --chat --json --max-new-tokens 6")
    first, second = (json.loads(answer) for answer in run(line).splitlines())
    tokenizer = AutoTokenizer.from_pretrained(place / "exports" / "adaptive")
    conversation = [
        {"role": "user", "content": "What is blue?"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "And two?"},
    ]
    for sample, messages in ((first, conversation[:1]), (second, conversation)):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert sample["prompt_tokens"] == len(ids)


def test_text(run, place) -> None:
    shown = run(line_of("held_out.txt", "--stride 16"))
    report = json.loads((place / "text.json").read_text())["checkpoint"]["text"]["held_out.txt"]
    assert report["bytes"] == len("\n".join(TEXT).encode()) and report["expert_use"]["tokens"] == report["tokens"]
    assert f"{report['bits_per_byte']:.4f} bits a byte" in shown and f"perplexity {report['perplexity']:.4f}" in shown
    assert len(report["expert_use"]["layers"]) == 2 and 0 < report["expert_use"]["null_share"] < 1


def test_questions(run, place) -> None:
    shown = run(line_of("--predictions"))
    task = json.loads((place / "report.json").read_text())["checkpoint"]["tasks"]["questions.jsonl"]
    predictions = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    assert task["items"] == len(predictions) == len(many_questions())
    for kind, accuracy in task["accuracy"].items():
        right = sum(one["chosen"][kind] == one["answer"] for one in predictions)
        assert accuracy["correct"] == right and f"accuracy ({kind}) {right / len(predictions):.4f}" in shown
    batch_of_one = line_of("--predictions").replace("--batch-size 4", "--batch-size 1")
    run(batch_of_one)
    alone = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    for one, other in zip(alone, predictions, strict=True):  # two choices may be as likely but for rounding
        assert one["tokens"] == other["tokens"]
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3)


def test_a_comparison(run) -> None:
    line = line_of("--baseline")
    report = json.loads(run(f"{line} --json"))
    assert set(report) == {"settings", "checkpoint", "baseline", "comparison"} and report["settings"]["limit"] == 4
    here, there = (report[name]["tasks"]["questions.jsonl"] for name in ("checkpoint", "baseline"))
    paired = report["comparison"]["tasks"]["questions.jsonl"]
    gap = here["accuracy"]["bytes"]["value"] - there["accuracy"]["bytes"]["value"]
    assert here["items"] == 4 and paired["accuracy"]["bytes"]["difference"] == pytest.approx(gap)
    assert there["expert_use"]["true_experts_per_token"] == 2 and there["expert_use"]["null_share"] == 0
    assert paired["true_experts_per_token"] == pytest.approx(here["expert_use"]["true_experts_per_token"] - 2)
    shown = run(line)
    assert "McNemar p" in shown and "one document: no interval" in shown


def test_the_harness_agrees_on_an_export(run, place) -> None:
    run(line_of("convert_checkpoint.py export"))
    run(line_of("--write-items"))
    (place / "tasks" / "my_questions.yaml").write_text(TASK[0])
    environment = {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hf_home"), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    done = run_command(shlex.split(line_of("lm-eval")), place, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = place.glob("harness*.json")
    theirs = json.loads(file.read_text())["results"]["my_questions"]
    reports = []
    for checkpoint in ("exports/trained", "runs/adaptive"):
        run(f"python tools/evaluate.py --checkpoint {checkpoint} --tasks questions.jsonl --output ours.json")
        reports.append(json.loads((place / "ours.json").read_text())["checkpoint"]["tasks"]["questions.jsonl"])
    assert reports[0] == reports[1], "an export and its run"
    ours = reports[0]["accuracy"]
    for name, kind in (("acc", "sum"), ("acc_norm", "characters")):
        assert theirs[f"{name},none"] == pytest.approx(ours[kind]["value"], abs=1e-12)
        assert theirs[f"{name}_stderr,none"] == pytest.approx(ours[kind]["standard_error"], abs=1e-9)
    assert ours["sum"]["value"] != ours["characters"]["value"], "items that tell the two apart"


def test_a_run_is_opened_where_it_lies(run, place) -> None:
    text = run(line_of("--checkpoint runs/adaptive"))
    assert text.strip("\n")
    shown = run("python tools/evaluate.py --checkpoint runs/adaptive --text held_out.txt --context 32")
    iteration = run(
        "python tools/evaluate.py --checkpoint runs/adaptive/checkpoints/iter_0000002 --text held_out.txt --context 32"
    )
    assert "true experts a token" in shown and iteration.splitlines()[1:] == shown.splitlines()[1:]


def test_every_command_of_the_document_was_run() -> None:
    assert set(COMMANDS) == USED and len(COMMANDS) == 11 and len(TASK) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate.py --checkpoint exports/adaptive", "nothing to measure"),
        ("evaluate.py --tasks questions.jsonl", "--checkpoint is missing"),
        ("evaluate.py --checkpoint nowhere --tasks questions.jsonl", "nowhere is not a directory"),
        ("evaluate.py --checkpoint tasks --tasks questions.jsonl", "no complete checkpoint"),
        ("evaluate.py --checkpoint exports/adaptive --tasks none.jsonl", "none.jsonl is not a file"),
        ("evaluate.py --checkpoint exports/adaptive --text empty.txt", "holds no text"),
        ("evaluate.py --checkpoint exports/adaptive --text held_out.txt --context 65", "--context 65"),
        ("evaluate.py --checkpoint exports/adaptive --text held_out.txt --batch-size 0", "--batch-size 0"),
        ("evaluate.py --checkpoint exports/adaptive --text held_out.txt --output no/where.json", "does not exist"),
        (
            "evaluate.py --checkpoint exports/adaptive --text held_out.txt --output tasks",
            "--output tasks is a directory",
        ),
        ("evaluate.py --checkpoint exports/adaptive --tasks questions.jsonl --predictions tasks", "is a directory"),
        ("evaluate.py --checkpoint exports/adaptive --text held_out.txt --predictions p.jsonl", "is about --tasks"),
        ("evaluate.py --checkpoint exports/adaptive --text none.txt --dtype int3", "--dtype int3"),
        ("evaluate.py --text held_out.txt --write-items out.jsonl", "give --tasks"),
        ("evaluate.py --tasks questions.jsonl --write-items tasks", "--write-items tasks is a directory"),
        ("evaluate.py --tasks questions.jsonl --write-items o.jsonl --output o.json", "--output does nothing beside"),
        (
            "evaluate.py --tasks questions.jsonl --write-items o.jsonl --checkpoint exports/adaptive",
            "--checkpoint does",
        ),
        ("generate.py --checkpoint exports/adaptive --prompt x --temperature 1e-40", "--temperature 1e-40"),
        ("generate.py --checkpoint exports/adaptive --prompt x --repetition-penalty 1e-40", "--repetition-penalty 1e"),
        ("generate.py --checkpoint exports/adaptive --prompt x --seed 99999999999999999999", "--seed 9999"),
        ("generate.py --checkpoint exports/adaptive --prompt x\udcff", "--prompt has .* at 1, which is no character"),
        ("generate.py --checkpoint exports/adaptive --prompt-file deep.jsonl", "deep.jsonl:1 is not JSON"),
        ("generate.py --checkpoint exports/adaptive", "one of the arguments --prompt"),
        ("generate.py --checkpoint exports/adaptive --prompt x --num-samples 0", "--num-samples 0"),
        ("generate.py --checkpoint exports/adaptive --prompt-file nowhere", "--prompt-file nowhere"),
        ("generate.py --checkpoint exports/vanilla --prompt x --system y", "--system 'y' is part of a conversation"),
    ],
)
def test_refusals(run, place, line: str, message: str) -> None:
    (place / "empty.txt").write_text("\n")
    (place / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=message):
        run(f"python tools/{line}")


def test_a_refusal_is_one_line_and_exit_code_2(place) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "evaluate.py"),
        "--checkpoint",
        "exports",
        "--text",
        "held_out.txt",
    ]
    done = run_command(command, place)
    assert done.returncode == 2 and len(done.errors) == 1 and "Traceback" not in done.stderr and done.stdout == ""
