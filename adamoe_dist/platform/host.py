"""Settings of the C libraries below torch that training on CPU cores depends on. Imports no torch."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")
"""After a parallel region GNU's OpenMP lets its threads spin for some milliseconds, on cores that the experts' threads
then lack; read once, when torch loads it."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
    """Keep freed memory for the next step, and return whether the C library was told to (glibc can be).

    By default large blocks go back to the system when they are freed and come again as pages that must be faulted in
    and cleared: with 64 experts that took a quarter of a layer's time. Peak memory is the same; less of it is given
    back between the peaks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, value) for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)))


def available_bytes() -> int | None:
    """Return the memory that this process can still have, of the machine and of its control group; None: not known."""
    found: list[int] = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # pages of files, given back where memory is short
                used -= int(line.split()[1])
        found.append(int((group / "memory.max").read_text()) - used)
    return min(found, default=None)


def peak_resident_bytes() -> int:
    """Return the most memory of this program that was resident at once.

    Where the kernel does not say it, the most of this process: who started it may have been larger, and counts, too.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
