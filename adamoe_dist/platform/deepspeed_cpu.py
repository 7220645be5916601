"""What keeps DeepSpeed from compiling C++ at start on a CPU."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from adamoe_dist.platform.device import is_cuda


@contextlib.contextmanager
def without_compiled_collectives() -> Iterator[None]:
    """Let DeepSpeed's communication start without building its shared-memory collective.

    On a CPU DeepSpeed compiles that extension in every fresh environment (about half a minute and a C++ compiler); only
    its inference all-reduce uses it. Training communicates through gloo either way.
    """
    if is_cuda():
        yield
        return
    backend: Any = importlib.import_module("deepspeed.comm.torch")

    build = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = build
