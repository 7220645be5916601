"""A small tokenizer and small prepared data, made once."""

import random
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from adamoe_dist.console import run_tool
from adamoe_dist.data import Document, Tokenizer, prepare_corpus, train_tokenizer

TOOLS = Path(__file__).parents[2] / "tools"


class Finished(NamedTuple):
    code: int
    out: str
    error_lines: list[str]


def _tool(name: str) -> ModuleType:
    spec = util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call_tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run a tool in this process as its command line would."""

    def call(name: str, *arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_tool(_tool(name).main)
        out, error = capfd.readouterr()
        return Finished(int(exit_.value.code or 0), out, error.splitlines())

    return call


@pytest.fixture
def refused(call_tool: Callable[..., Finished]) -> Callable[..., str]:
    """Run a tool that must refuse its input in one line, and return the line."""

    def call(name: str, *arguments: object) -> str:
        finished = call_tool(name, *arguments)
        assert finished.code == 2, finished
        assert len(finished.error_lines) == 1, finished.error_lines
        assert finished.error_lines[0].startswith("error: ")
        assert finished.out == ""
        return finished.error_lines[0]

    return call


def words(seed: int, count: int) -> str:
    """Text of words with a skewed distribution."""
    draw = random.Random(seed)
    vocabulary = ["def", "return", "alpha", "beta", "gamma", "delta", "epsilon", "import", "for", "in"]
    return "".join(
        draw.choice(vocabulary[: draw.randint(1, 10)]) + draw.choice([" ", "\n    ", "\n", "_", "  "])
        for _ in range(count)
    )


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Document(words(seed, 400), str(seed)) for seed in range(8)], 320, output)
    return output


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents of very different lengths."""
    directory = tmp_path_factory.mktemp("text")
    for index in range(30):
        (directory / f"{index:02}.txt").write_bytes(words(100 + index, 3 + 7 * index).encode())
    return directory


@pytest.fixture(scope="session")
def prepared(text_dir: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of prepared data with both parts."""
    prefix = tmp_path_factory.mktemp("prepared") / "words"
    prepare_corpus([str(text_dir)], tokenizer, prefix, validation_fraction=0.2)
    return prefix


def documents_on_disk(prefix: Path | str) -> Sequence[list[int]]:
    """The documents of a part, read without the code under test."""
    indexed = import_module("megatron.core.datasets.indexed_dataset")
    return [list(map(int, sequence)) for sequence in indexed.IndexedDataset(str(prefix))]
