"""Where DeepSpeed's own C++ is compiled, so that a build which was killed holds up nobody."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

VARIABLE = "TORCH_EXTENSIONS_DIR"


def directory() -> Path:
    """Return the directory of this project's builds: one for each version of Python, torch and DeepSpeed."""
    root = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(root) if root else cache / "torch_extensions"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return base / "adamoe_dist" / f"{python}-torch{torch.__version__}-deepspeed{version('deepspeed')}"


@contextlib.contextmanager
def building_alone() -> Iterator[Path]:
    """Let torch compile in :func:`directory`, which is given, one process at a time.

    While torch compiles, a file named ``lock`` says so; others wait until it is gone. A process that is killed leaves
    it, and all that come later wait for ever. Here a lock of the kernel's, which ends with its holder, goes around
    torch's: whoever has it knows that a ``lock`` which is still there is a dead process's.

    Raises:
        OSError: the directory cannot be written.
    """
    place = directory()
    place.mkdir(parents=True, exist_ok=True)
    before = os.environ.get(VARIABLE)
    with (place / "builder").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        for left in place.glob("*/lock"):
            left.unlink()
        os.environ[VARIABLE] = str(place)
        try:
            yield place
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
