"""Time by phase and by part of the MoE layers, from the ranges of a step."""

from collections import defaultdict
from typing import Any, NamedTuple

from adamoe_dist.platform import StreamClock
from adamoe_dist.timing.ranges import BACKWARD, PHASES


class _Span(NamedTuple):
    name: str
    parent: str | None
    start: Any
    end: Any


class PhaseClock:
    """Adds up the seconds of each range that it hears of.

    Each moment counts for the phase of the step that it is in, and within that for the innermost range: a shared expert
    that is computed while rows travel is no dispatch. Inside the backward pass nothing is counted but the whole: layers
    that are computed again there are backward.
    """

    def __init__(self) -> None:
        self._clock = StreamClock()
        self._open: list[tuple[str, Any]] = []
        self._spans: list[_Span] = []

    def enter(self, name: str) -> None:
        """Begin a range."""
        self._open.append((name, None if self._is_in_backward else self._clock.mark()))

    def leave(self) -> None:
        """End the innermost range."""
        name, start = self._open.pop()
        if not self._is_in_backward:
            parent = self._open[-1][0] if self._open else None
            self._spans.append(_Span(name, parent, start, self._clock.mark()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each name since the last call, and start anew.

        On CUDA the device must have done all work that was marked.
        """
        assert not self._open, f"the clock is read within {self._open[-1][0]}"
        seconds: dict[str, float] = defaultdict(float)
        for span in self._spans:
            duration = self._clock.seconds(span.start, span.end)
            seconds[span.name] += duration
            if span.parent is not None and span.parent not in PHASES:
                seconds[span.parent] -= duration
        self._spans = []
        self._clock.reset()
        return dict(seconds)

    @property
    def _is_in_backward(self) -> bool:
        return bool(self._open) and self._open[0][0] == BACKWARD
