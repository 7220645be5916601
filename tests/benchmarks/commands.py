"""Runs the benchmarks as a user does."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def environment(**changes: str) -> dict[str, str]:
    """This interpreter's scripts first on the path, this checkout's package, one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **changes}


def benchmark(
    name: str, *arguments: str, ranks: int = 1, timeout_s: float = 300, **changes: str
) -> subprocess.CompletedProcess[str]:
    program = [str(REPOSITORY / "benchmarks" / name), *arguments]
    launcher = [sys.executable]
    if ranks > 1:
        from tests.distributed.harness import free_port

        launcher = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return subprocess.run(
        [*launcher, *program],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(**changes),
        cwd=REPOSITORY,
    )
