"""A clock in the order of the device's work, read without waiting for it."""

import time
from typing import Any

import torch


class StreamClock:
    """Marks moments: by the host's clock on CPU, by events of the current stream on CUDA.

    A mark waits for nothing. What lies between two of them may be read once the device has reached the second, as it
    has after :func:`adamoe_dist.platform.synchronize`. Events are used again after :meth:`reset`.
    """

    def __init__(self) -> None:
        self._is_cuda = torch.cuda.is_available()
        self._events: list[torch.cuda.Event] = []
        self._used = 0

    def mark(self) -> Any:
        """Return a mark of now, on the stream or of the host."""
        if not self._is_cuda:
            return time.perf_counter()
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        event = self._events[self._used]
        self._used += 1
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks that the device has reached."""
        if not self._is_cuda:
            return float(end - start)
        return float(start.elapsed_time(end)) * 1e-3

    def reset(self) -> None:
        """Take back all marks; none of them may be read afterwards."""
        self._used = 0
