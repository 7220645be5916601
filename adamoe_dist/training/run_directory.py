"""The run directory: what is in it at the start, and what may not be."""

import json
import os
import platform as host
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adamoe_dist import __version__
from adamoe_dist.checkpoint import SUBDIRECTORY, has_checkpoints
from adamoe_dist.config import Config
from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError

TOKENIZER = "tokenizer"
PACKAGES = ("torch", "deepspeed", "megatron-core", "transformer-engine", "sentencepiece", "tensorboard", "numpy")


def check_run_directory(config: Config) -> None:
    """Refuse to start a new run where another one's checkpoints are.

    Raises:
        UserError: naming the directory and the ways out.
    """
    root = checkpoint_root(config)
    if config.checkpoint.resume == "none" and has_checkpoints(root):
        raise UserError(
            f"run.dir={config.run_dir} already has checkpoints; set checkpoint.resume=auto to continue that run, or "
            "another run.dir or run.name for a new one"
        )
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise UserError(f"run.dir={config.run_dir} is a file; name a directory")
    parent = next(path for path in (config.run_dir, *config.run_dir.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"run.dir={config.run_dir} cannot be written ({parent} is read-only); name another directory")


def checkpoint_root(config: Config) -> Path:
    """Return where a run's checkpoints are."""
    return config.run_dir / SUBDIRECTORY


def create_run_directory(config: Config) -> None:
    """Write what identifies the run: its resolved configuration and its environment. On one rank."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    text = json.dumps(environment(), indent=2) + "\n"
    (config.run_dir / "environment.json").write_text(text, encoding="utf-8")


def keep_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Copy the run's tokenizer beside its checkpoints, which know it by its fingerprint only. On one rank."""
    tokenizer.save(config.run_dir / TOKENIZER)


def environment() -> dict[str, Any]:
    """Return versions, host, commit and command."""
    return {
        "adamoe_dist": __version__,
        "python": host.python_version(),
        "platform": host.platform(),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
        "git_commit": _git_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None outside of one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
