"""A stand-in for a disk that is full: the kernel refuses to let files grow, half-way in a write."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files(largest: int) -> Iterator[None]:
    """Let this process make no file larger than ``largest`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
