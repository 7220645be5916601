"""From a dense model in a GGUF file to an AdaMoE model that `transformers` loads, and what null experts changed.

The steps of docs/walkthrough.md, one after the other, each by the command that a user types. What is there already is
not made again, so the same command continues where it was stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walkthrough_data import dense_model, fetch_model, fetch_questions

from adamoe_dist.console import ToolParser, run_tool, say
from adamoe_dist.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS, LAUNCH = REPOSITORY / "tools", REPOSITORY / "launch"


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared: the same experts with ``num_null`` null experts and ``top_k`` slots."""

    name: str
    num_null: int
    top_k: int


def _parser() -> ToolParser:
    parser = ToolParser("Upcycle SmolLM2-135M, give it null experts, fine-tune it, evaluate it; continues if repeated.")
    parser.add_argument("--directory", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--gguf", type=Path, help="another dense model than SmolLM2-135M")
    parser.add_argument("--train", type=Path, help="another JSONL file to train on (prompt, completion)")
    parser.add_argument("--tests", type=Path, nargs="+", help="other JSONL files of multiple choice to evaluate")
    parser.add_argument("--num-experts", type=int, default=4, help="true experts a layer, copies of the dense layer")
    parser.add_argument("--num-null-experts", type=int, default=4, help="null experts a layer of the AdaMoE model")
    parser.add_argument("--top-k", type=int, default=3, help="slots of the AdaMoE model; the other has 2")
    parser.add_argument("--ranks", type=int, default=2, help="processes (GPUs) that train")
    parser.add_argument("--limit", type=int, help="evaluate so many questions of each file only")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences that evaluation scores at once")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="configuration keys of both runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def run(*command: object) -> None:
    """Show a command and run it with this interpreter's scripts first on the path."""
    words = [str(word) for word in command]
    say("== " + shlex.join(words))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = subprocess.run(words, env={**os.environ, "PATH": path}, check=False).returncode
    if code:
        raise UserError(f"the last command ended with code {code}; repeat this one to continue")


def prepare(arm: Arm, options: argparse.Namespace) -> Path:
    """Make the model with experts out of the dense one."""
    target = options.directory / f"start_{arm.name}"
    if not target.exists():
        null = ["--num-null-experts", arm.num_null, "--null-init", "copy"] if arm.num_null else []
        run(
            *(sys.executable, TOOLS / "convert_checkpoint.py", "upcycle"),
            *("--from", options.directory / "dense", "--to", target),
            *("--num-experts", options.num_experts, "--top-k", arm.top_k, *null),
        )
    return target


def finetune(arm: Arm, start: Path, train: Path, options: argparse.Namespace) -> Path:
    """Fine-tune it, or continue."""
    run_dir = options.directory / f"run_{arm.name}"
    export = options.directory / arm.name
    if not export.exists():
        run(
            *("deepspeed", "--num_accelerators", options.ranks, LAUNCH / "finetune.py"),
            *("--config", REPOSITORY / "configs" / "finetune.yaml"),
            *(f"run.dir={run_dir}", f"run.name={arm.name}", f"checkpoint.load_weights={start}"),
            *(f"data.train=[{{path: {train}, weight: 1}}]", "checkpoint.resume=auto", *options.set),
        )
        run(sys.executable, TOOLS / "convert_checkpoint.py", "export", "--from", run_dir, "--to", export)
    return export


def evaluate(model: Path, tests: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a Hugging Face directory; return what tools/evaluate.py wrote."""
    output = options.directory / f"evaluation_{model.name}.json"
    if not output.exists():
        limit = [] if options.limit is None else ["--limit", options.limit]
        run(
            *(sys.executable, TOOLS / "evaluate.py", "--checkpoint", model, "--tasks", *tests),
            *("--batch-size", options.batch_size, *limit, "--output", output),
        )
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return content


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a Markdown table: each model on each file of questions, and what its experts did there."""
    lines = [
        "| model | questions | accuracy, by length in characters (95 %) | true experts a token | null share | "
        "expert FLOPs saved against top-2 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        for file, task in result["checkpoint"]["tasks"].items():
            accuracy, used = task["accuracy"]["characters"], task["expert_use"]
            low, high = accuracy["interval_95"]
            experts = "| | |"
            if used is not None:
                load = used["true_experts_per_token"]
                experts = f"{load:.2f} | {used['null_share']:.1%} | {1 - load / 2:.1%} |"
            lines.append(
                f"| {name} | {Path(file).stem} ({task['items']}) | {accuracy['value']:.3f} ({low:.3f}-{high:.3f}) | "
                f"{experts}"
            )
    return lines


def main(argv: list[str]) -> None:
    """Do what is left to do, and print the table."""
    options = _parser().parse_args(argv)
    if options.num_null_experts < 1:
        raise UserError(f"--num-null-experts {options.num_null_experts}: the AdaMoE model needs 1 or more")
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "dense").exists():
        dense_model(options.gguf or fetch_model(directory), directory / "dense")
    if options.train and options.tests:
        train, tests = options.train, options.tests
    elif options.train or options.tests:
        raise UserError("--train and --tests go together; give both or neither")
    else:
        train, tests = fetch_questions(directory)
    results = {"dense": evaluate(directory / "dense", tests, options)}
    arms = [Arm("top2", 0, 2), Arm("adamoe", options.num_null_experts, options.top_k)]
    for arm in arms:
        model = finetune(arm, prepare(arm, options), train, options)
        results[arm.name] = evaluate(model, tests, options)
    say("")
    for line in table(results):
        say(line)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
