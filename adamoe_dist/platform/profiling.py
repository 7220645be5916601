"""What profilers can record on this device."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

MEMORY_HISTORY_ENTRIES = 200_000
"""Allocations that a memory snapshot goes back, at most."""


def profiled_activities() -> list[ProfilerActivity]:
    """Return the kinds of work that torch's profiler records: that of the host, and on CUDA that of the kernels."""
    kinds = [ProfilerActivity.CPU]
    return [*kinds, ProfilerActivity.CUDA] if torch.cuda.is_available() else kinds


def is_under_nsight() -> bool:
    """Tell whether NVIDIA's ``nsys`` has started this process; it reads NVTX ranges."""
    return torch.cuda.is_available() and "NSYS_PROFILING_SESSION_ID" in os.environ


def push_device_range(name: str) -> None:
    """Begin an NVTX range on CUDA; nothing on CPU."""
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_push(name)


def pop_device_range() -> None:
    """End the last NVTX range on CUDA; nothing on CPU."""
    if torch.cuda.is_available():
        torch.cuda.nvtx.range_pop()


def start_memory_history() -> None:
    """Record allocations and their stacks from now on, on CUDA; a CPU's allocator keeps no history."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_HISTORY_ENTRIES)


def stop_memory_history(path: Path | None) -> None:
    """Write what :func:`start_memory_history` recorded as the pickle that pytorch.org/memory_viz reads, and stop.

    Args:
        path: of the file; None: the record is dropped. On CPU there is nothing to write.
    """
    if not torch.cuda.is_available():
        return
    try:
        if path is not None:
            torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
