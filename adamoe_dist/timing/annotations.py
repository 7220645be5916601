"""The ranges of a step as profilers show them."""

from torch.profiler import record_function

from adamoe_dist.platform import pop_device_range, push_device_range


class Annotations:
    """Shows each range in a trace of torch's profiler, and on CUDA as an NVTX range too."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def enter(self, name: str) -> None:
        """Begin a range."""
        shown = record_function(name)
        shown.__enter__()
        self._open.append(shown)
        push_device_range(name)

    def leave(self) -> None:
        """End the innermost range."""
        pop_device_range()
        self._open.pop().__exit__(None, None, None)
