"""The command line of the conversion tool, in this process."""

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

ROOT = Path(__file__).parents[2]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> str:
    """Run a command; return what it prints."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(printed):
        os.environ.pop("MASTER_PORT", None)
        _tool().main(list(arguments))
    return printed.getvalue()


def refusal(*arguments: str) -> str:
    """Run a command that is refused with exit code 2; return its line."""
    from adamoe_dist.console import run_tool

    printed = io.StringIO()
    with (
        pytest.raises(SystemExit) as stopped,
        contextlib.redirect_stderr(printed),
        mock.patch("sys.argv", ["convert_checkpoint.py", *arguments]),
    ):
        run_tool(_tool().main)
    assert stopped.value.code == 2, printed.getvalue()
    return printed.getvalue()
