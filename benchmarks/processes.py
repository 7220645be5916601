"""What benchmarks of whole processes share: ranks of their own, and their memory."""

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch

from adamoe_dist import platform


def run_ranks(script: str, arguments: list[str], ranks: int) -> str:
    """Run a benchmark in fresh processes, one a rank, and return the last line that rank 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["LOCAL_WORLD_SIZE"] = shared["WORLD_SIZE"]
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{arguments} failed with {[process.returncode for process in processes]}")
    return outputs[0].splitlines()[-1]


def free_at_once() -> None:
    """Undo what :func:`adamoe_dist.platform.host.keep_memory` asks of glibc: resident memory is to be what is used."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in ((-4, 65536), (-1, 2**17), (-3, 2**17)):
            mallopt(name, value)


def memory_now() -> float:
    """Return bytes allocated on the GPU, or resident on the CPU."""
    return float(torch.cuda.memory_allocated()) if platform.is_cuda() else resident("VmRSS")


def forget_peak() -> None:
    """Let :func:`peak` count from now on."""
    if platform.is_cuda():
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_resident_peak()


def peak() -> float:
    """Return the most that :func:`memory_now` has been."""
    return float(torch.cuda.max_memory_allocated()) if platform.is_cuda() else resident("VmHWM")


def resident(field: str) -> float:
    """Return bytes of CPU memory: ``VmRSS`` now, ``VmHWM`` at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_resident_peak() -> None:
    """Let ``VmHWM`` count from now on."""
    Path("/proc/self/clear_refs").write_text("5")
