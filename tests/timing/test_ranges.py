"""Ranges and their clock against a count, moment by moment, of who is in hand."""

import random
import timeit
from typing import Any

import pytest
import torch

from adamoe_dist import timing
from adamoe_dist.platform import StreamClock
from adamoe_dist.timing import BACKWARD, LAYER_PARTS, PHASES, PhaseClock, Ranges

NAMES = (*PHASES, *LAYER_PARTS, timing.SHARED_EXPERT)


class Ticks(StreamClock):
    """Time that passes only when told to."""

    def __init__(self) -> None:
        super().__init__()
        self._is_cuda = False
        self.now = 0.0

    def mark(self) -> Any:
        return self.now


def random_program(random_numbers: random.Random, depth: int = 0) -> list[Any]:
    """A tree of waits (numbers) and ranges (name, contents); the outermost are phases."""
    program: list[Any] = []
    for _ in range(random_numbers.randint(1, 4)):
        program.append(float(random_numbers.randint(1, 9)))
        if depth < 4:
            name = random_numbers.choice(PHASES if depth == 0 else NAMES[len(PHASES) :])
            program.append((name, random_program(random_numbers, depth + 1)))
    return program


def played(program: list[Any], ranges: Ranges, clock: Ticks) -> None:
    for item in program:
        if isinstance(item, float):
            clock.now += item
        else:
            name, inner = item
            with ranges(name):
                played(inner, ranges, clock)


def expected(program: list[Any], path: tuple[str, ...] = ()) -> dict[str, float]:
    """Each wait counts for its phase, and but for the backward pass for the innermost range around it."""
    seconds: dict[str, float] = dict.fromkeys(NAMES, 0.0)
    for item in program:
        if isinstance(item, float):
            if path:
                for name in {path[0]} if path[0] == BACKWARD else {path[0], path[-1]}:
                    seconds[name] += item
        else:
            for name, value in expected(item[1], (*path, item[0])).items():
                seconds[name] += value
    return seconds


@pytest.mark.parametrize("seed", range(20))
def test_every_moment_counts_once(monkeypatch, seed: int) -> None:
    clock, ranges = PhaseClock(), Ranges()
    ticks = Ticks()
    monkeypatch.setattr(clock, "_clock", ticks)
    ranges.add(clock)
    program = random_program(random.Random(seed))
    for _ in range(2):  # and again from zero
        played(program, ranges, ticks)
        found = clock.take()
        assert {**dict.fromkeys(NAMES, 0.0), **found} == pytest.approx(expected(program))


def test_nobody_listens_and_it_is_free() -> None:
    ranges, clock = Ranges(), PhaseClock()
    assert ranges("forward") is ranges("routing"), "one object for all"
    ranges.add(clock)
    ranges.remove(clock)
    ranges.remove(clock)
    with ranges("forward"):
        pass
    assert clock.take() == {}
    cost_s = min(timeit.repeat("with ranges('routing'): pass", globals={"ranges": ranges}, number=10_000)) / 10_000
    assert cost_s < 5e-6


def test_an_exception_ends_the_range() -> None:
    ranges, clock = Ranges(), PhaseClock()
    ranges.add(clock)
    with pytest.raises(ZeroDivisionError), ranges("forward"), ranges("routing"):
        raise ZeroDivisionError
    assert set(clock.take()) == {"forward", "routing"}


def test_a_clock_is_not_read_in_the_middle() -> None:
    ranges, clock = Ranges(), PhaseClock()
    ranges.add(clock)
    with ranges("forward"), pytest.raises(AssertionError, match="read within forward"):
        clock.take()


class Event:
    """A CUDA event on a machine without: the device is ten moments behind, until someone waits for it."""

    made = 0
    now_ms = 0.0
    reached_ms = -1.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.now_ms += 1.0
        self.at_ms = Event.now_ms

    def elapsed_time(self, end: "Event") -> float:
        assert max(self.at_ms, end.at_ms) <= Event.reached_ms, "this would have waited for the device"
        return end.at_ms - self.at_ms


def test_on_cuda_nothing_waits_and_events_are_used_again(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ranges, clock = Ranges(), PhaseClock()
    ranges.add(clock)
    for _ in range(3):
        for _ in range(5):
            with ranges("forward"), ranges("dispatch"), ranges("shared_expert"):
                pass
            with ranges("backward"), ranges("routing"):
                pass
        Event.reached_ms = Event.now_ms
        found = clock.take()
        assert found == pytest.approx({"forward": 25e-3, "dispatch": 10e-3, "shared_expert": 5e-3, "backward": 5e-3})
    assert Event.made == 5 * 8
