"""From a dense model in a GGUF file to an AdaMoE model that `transformers` loads, and what null experts changed.

The steps of docs/walkthrough.md, one after the other, each by the command that a user types. What is there already is
not made again, so the same command continues where it was stopped; with other options what they concern is evaluated
again, or refused where it would have to be trained again.
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
from adamoe_dist.files import check_output_files, write_files

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS, LAUNCH = REPOSITORY / "tools", REPOSITORY / "launch"
OPTIONS = "options.json"
MADE_WITH = {
    "gguf": ("dense",),
    "num_experts": ("start_top2", "start_adamoe"),
    "num_null_experts": ("start_adamoe",),
    "top_k": ("start_adamoe",),
    "train": ("run_top2", "run_adamoe"),
    "set": ("run_top2", "run_adamoe"),
}
"""The options that decide what is in a directory of a walkthrough, with the directories of each."""


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
        say(f"the last command ended with code {code}; repeat this one to continue")
        sys.exit(code if code > 0 else 128 - code)


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
            f"data.train=[{{path: {json.dumps(str(train), ensure_ascii=False)}, weight: 1}}]",
            *("checkpoint.resume=auto", "checkpoint.interval=25", "checkpoint.keep_last=1", *options.set),
        )
        run(sys.executable, TOOLS / "convert_checkpoint.py", "export", "--from", run_dir, "--to", export)
    return export


def evaluate(model: Path, tests: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a Hugging Face directory; return what tools/evaluate.py wrote, now or before of the same questions."""
    output = options.directory / f"evaluation_{model.name}.json"
    if not _is_of(output, tests, options.limit):
        limit = [] if options.limit is None else ["--limit", options.limit]
        run(
            *(sys.executable, TOOLS / "evaluate.py", "--checkpoint", model, "--tasks", *tests),
            *("--batch-size", options.batch_size, *limit, "--output", output),
        )
    content: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return content


def _is_of(output: Path, tests: list[Path], limit: int | None) -> bool:
    """Tell whether a report is there and about so many questions of these files."""
    if not output.exists():
        return False
    report = json.loads(output.read_text(encoding="utf-8"))
    return report["settings"]["limit"] == limit and list(report["checkpoint"]["tasks"]) == [str(test) for test in tests]


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


def check(options: argparse.Namespace) -> None:
    """Refuse options that a later step would refuse, before the first one.

    Raises:
        UserError: naming the option.
    """
    if options.num_null_experts < 1:
        raise UserError(f"--num-null-experts {options.num_null_experts}: the AdaMoE model needs 1 or more")
    if options.num_experts < 2:
        raise UserError(f"--num-experts {options.num_experts}: the model beside AdaMoE's uses 2, so give 2 or more")
    slots = options.num_experts + options.num_null_experts
    if not 1 <= options.top_k <= slots:
        raise UserError(f"--top-k {options.top_k}: there are {slots} experts with the null ones; give 1 to {slots}")
    for name in ("ranks", "batch_size", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if bool(options.train) != bool(options.tests):
        raise UserError("--train and --tests go together; give both or neither")
    for name, files in (("gguf", [options.gguf]), ("train", [options.train]), ("tests", options.tests or [])):
        for file in files:
            if file is not None and not file.is_file():
                raise UserError(f"--{name} {file} is not a file; give one that is there")
    if options.json:
        check_output_files([("--json", options.json)])


def keep_options(options: argparse.Namespace) -> None:
    """Write the options that training follows beside its results, and refuse others than those that made them.

    Raises:
        UserError: naming the first option that differs.
    """
    file = options.directory / OPTIONS
    given = {name: getattr(options, name) for name in MADE_WITH}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, products in MADE_WITH.items():
        made = [product for product in products if (options.directory / product).exists()]
        if made and name not in kept:
            raise UserError(
                f"--directory {options.directory} has {made[0]}, but no {OPTIONS} that says how it was made"
            )
        if made and kept[name] != given[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {given[name]}: {options.directory / made[0]} was made with {kept[name]}; "
                "give another --directory"
            )
    write_files([("--directory", file, (json.dumps(given, indent=1) + "\n").encode())])


def main(argv: list[str]) -> None:
    """Do what is left to do, and print the table."""
    options = _parser().parse_args(argv)
    check(options)
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    keep_options(options)
    if not (directory / "dense").exists():
        dense_model(options.gguf or fetch_model(directory), directory / "dense")
    if options.train and options.tests:
        train, tests = options.train, options.tests
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
        write_files([("--json", options.json, (json.dumps(results, indent=1) + "\n").encode())])


if __name__ == "__main__":
    run_tool(main)
