"""Stand-ins that let Megatron-core 0.16 to 0.19 run without CUDA.

Megatron-core names the CUDA device and its streams unconditionally: ``torch.cuda.current_device()`` as a
``device=`` argument, and streams and events around its token dispatcher. Without CUDA each of them raises. Here they
are answered for the CPU: the device is ``cpu``, and a stream is an object on which everything has already happened,
which is true of a CPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class CpuEvent:
    """A CUDA event's face over a CPU: whatever was recorded is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Do nothing: the work is done."""

    def wait(self, *_: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: the work is done."""
        return True


class CpuStream:
    """A CUDA stream's face over a CPU: work is done when it is issued, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        """Return at once."""

    def wait_event(self, *_: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """Return an event that has happened."""
        return event or CpuEvent()


_CURRENT_STREAM = CpuStream()


@contextlib.contextmanager
def _inert_stream(_: Any) -> Iterator[None]:
    yield


def install_stand_ins() -> None:
    """Put the stand-ins in place; only where CUDA is absent, and only once.

    It must run before Megatron-core's modules are used, not before they are imported.
    """
    assert not torch.cuda.is_available(), "the CPU stand-ins must not replace a real CUDA runtime"
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda *_: _CURRENT_STREAM,
        "default_stream": lambda *_: _CURRENT_STREAM,
        "stream": _inert_stream,
        "synchronize": lambda *_: None,
        "Stream": CpuStream,
        "Event": CpuEvent,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    _adapt_moe_modules()
    _adapt_recomputation()
    _adapt_tensor_parallelism()


def _adapt_moe_modules() -> None:
    """Let Megatron's stock router and dispatcher, the baseline, run on CPU.

    Megatron-core 0.16's router names a Transformer Engine kernel that it imports only where that is installed, and the
    dispatchers turn split sizes into what a collective accepts only when they come from a CUDA tensor.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def as_host_value(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = as_host_value


def _adapt_tensor_parallelism() -> None:
    """Let Megatron fork its CUDA generator under sequence parallelism; without dropout nothing is drawn from it."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *_, **__: contextlib.nullcontext()


def _adapt_recomputation() -> None:
    """Let Megatron's activation recompute save and restore random states where there is no CUDA generator."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None
