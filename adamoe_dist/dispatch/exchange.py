"""Differentiable collectives of the experts' groups, each in two halves so that work can be done in between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

Meanwhile = Callable[[], None]
"""Work to do while rows travel."""


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Return once its buffer is filled, or on CUDA once the stream will wait for that."""
        ...


class Transport(Protocol):
    """A collective and the one that its gradient takes. Each starts, and returns the buffer that it fills."""

    def send(self, rows: Tensor) -> tuple[Tensor, Pending]:
        """Start the way there."""
        ...

    def send_back(self, gradient: Tensor) -> tuple[Tensor, Pending]:
        """Start the way back."""
        ...


@dataclass(frozen=True)
class AllToAll:
    """Rank g gets the ``sent[g]`` entries meant for it; ``received[g]`` come from rank g. None: equal parts."""

    group: dist.ProcessGroup
    sent: list[int] | None = None
    received: list[int] | None = None

    def send(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start sending (sum(sent), ...), by destination; (sum(received), ...) will come, by source."""
        return self._exchange(rows, self.sent, self.received)

    def send_back(self, gradient: Tensor) -> tuple[Tensor, dist.Work]:
        """Start returning a gradient."""
        return self._exchange(gradient, self.received, self.sent)

    def _exchange(self, rows: Tensor, sent: list[int] | None, received: list[int] | None) -> tuple[Tensor, dist.Work]:
        size = rows.shape[0] if received is None else sum(received)
        buffer = _buffer(rows, size)
        return buffer, dist.all_to_all_single(buffer, rows, received, sent, group=self.group, async_op=True)


@dataclass(frozen=True)
class AllGather:
    """Every rank gets everyone's rows; the gradient of a rank's rows is the sum of what all ranks return."""

    group: dist.ProcessGroup

    def send(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start gathering (T, ...) into (G x T, ...)."""
        buffer = _buffer(rows, rows.shape[0] * self.group.size())
        return buffer, dist.all_gather_into_tensor(buffer, rows, group=self.group, async_op=True)

    def send_back(self, gradient: Tensor) -> tuple[Tensor, dist.Work]:
        """Start summing (G x T, ...) into (T, ...)."""
        return ReduceScatter(self.group).send(gradient)


@dataclass(frozen=True)
class ReduceScatter:
    """Every rank gets the sum over all ranks of the part that is its own; the gradient is gathered."""

    group: dist.ProcessGroup

    def send(self, rows: Tensor) -> tuple[Tensor, dist.Work]:
        """Start summing (G x T, ...) into (T, ...)."""
        buffer = _buffer(rows, rows.shape[0] // self.group.size())
        return buffer, dist.reduce_scatter_tensor(buffer, rows, group=self.group, async_op=True)

    def send_back(self, gradient: Tensor) -> tuple[Tensor, dist.Work]:
        """Start gathering (T, ...) into (G x T, ...)."""
        return AllGather(self.group).send(gradient)


def _buffer(rows: Tensor, size: int) -> Tensor:
    return rows.new_empty((size, *rows.shape[1:]))


class _Flight:
    """A collective under way, forward or backward: what it reads, what it fills, and whether it is done."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.work: Pending | None = None
        self.tensors: tuple[Tensor, Tensor] | None = None

    def start(self, launch: Callable[[Tensor], tuple[Tensor, Pending]], source: Tensor) -> Tensor:
        assert self.work is None, "a collective was started before the last one was waited for"
        source = source.contiguous()
        arriving, self.work = launch(source)
        self.tensors = source, arriving
        return arriving

    def wait(self) -> Tensor:
        assert self.work is not None and self.tensors is not None, "nothing is under way"
        self.work.wait()
        _, arrived = self.tensors
        self.work = self.tensors = None
        return arrived


class _Start(torch.autograd.Function):
    """Start the collective; backward waits for the gradient's, which `_Wait` started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(flight.transport.send, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None


class _Wait(torch.autograd.Function):
    """Wait for the collective; backward starts the gradient's.

    What backward returns only has the shape that autograd asks for: the gradient is on its way to `_Start`.
    """

    @staticmethod
    def forward(ctx: Any, received: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.wait()
        ctx.mark_dirty(received)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(ctx.flight.transport.send_back, gradients[0])
        return gradients[0], None


def exchange(
    *travellers: tuple[Tensor, Transport], dtype: torch.dtype | None = None, meanwhile: Meanwhile | None = None
) -> list[Tensor]:
    """Send tensors over the group, all under way at once, and do other work while they travel.

    Backward, autograd runs the nodes made last first: the gradients set out, the other work's gradient is computed,
    and only then are they waited for.

    Args:
        travellers: tensors, and how each travels. Of these the first is the rows.
        dtype: the rows' type on the way, there and back; None: as they are.
        meanwhile: what to do after all are sent and before the first is waited for.

    Returns:
        What arrived, in the order of ``travellers``, each of the type that was sent.
    """
    flights = []
    for number, (tensor, transport) in enumerate(travellers):
        flight = _Flight(transport)
        outgoing = tensor if number or dtype is None else tensor.to(dtype)
        flights.append((cast(Tensor, _Start.apply(outgoing, flight)), flight, tensor.dtype))
    if meanwhile is not None:
        meanwhile()
    return [cast(Tensor, _Wait.apply(received, flight)).to(kind) for received, flight, kind in flights]


def exchange_equally(parts_G: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give rank g the slice ``parts_G[g]`` and return the slices meant for this rank, by source (no gradient)."""
    received = torch.empty_like(parts_G)
    dist.all_to_all_single(received, parts_G, group=group)
    return received


def gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return everyone's (T, ...) as (G x T, ...) (no gradient)."""
    gathered = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
    return gathered
