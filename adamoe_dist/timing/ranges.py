"""Named parts of a step: one place where they get their names, for every clock and profiler."""

from types import TracebackType
from typing import Protocol

DATA = "data"
FORWARD = "forward"
ROUTING = "routing"
DISPATCH = "dispatch"
EXPERTS = "experts"
COMBINE = "combine"
SHARED_EXPERT = "shared_expert"
BACKWARD = "backward"
PIPELINE = "pipeline"
OPTIMIZER = "optimizer"
SAVE = "save"

PHASES = (DATA, FORWARD, BACKWARD, PIPELINE, OPTIMIZER)
"""Of a step, one after the other: none lies inside another. ``pipeline`` is the exchange with neighbouring stages."""
LAYER_PARTS = (ROUTING, DISPATCH, EXPERTS, COMBINE)
"""Of an MoE layer's forward pass."""


class Listener(Protocol):
    """Who is told where ranges begin and end. Ranges are nested; one may end in another thread than it was begun in."""

    def enter(self, name: str) -> None:
        """Note that a range begins."""
        ...

    def leave(self) -> None:
        """Note that the innermost range ends."""
        ...


class _Unheard:
    """A range that nobody listens to."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _Heard:
    """A range that listeners are told of."""

    __slots__ = ("_listeners", "_name")

    def __init__(self, name: str, listeners: tuple[Listener, ...]) -> None:
        self._name, self._listeners = name, listeners

    def __enter__(self) -> None:
        for listener in self._listeners:
            listener.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in reversed(self._listeners):
            listener.leave()


_UNHEARD = _Unheard()


class Ranges:
    """Says which part of a step the code is in: ``with ranges(ROUTING): ...``; free where nobody listens.

    The training loop has one, which the model's MoE layers and the schedule share.
    """

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def __call__(self, name: str) -> _Unheard | _Heard:
        """Return a context manager for a part of the step."""
        return _Heard(name, self._listeners) if self._listeners else _UNHEARD

    def add(self, listener: Listener) -> None:
        """Tell ``listener`` of the ranges that begin from now on; not from within a range."""
        self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Tell ``listener`` no more, if it was told at all; not from within a range."""
        self._listeners = tuple(other for other in self._listeners if other is not listener)
