"""Settings of the C libraries below torch that training on CPU cores depends on. Imports no torch."""

import ctypes
import os

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
