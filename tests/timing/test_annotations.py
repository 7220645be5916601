"""The names of ranges in torch's profiler, and as NVTX ranges on CUDA."""

import torch

from adamoe_dist.timing import Annotations, Ranges


def test_ranges_are_in_the_trace_and_nested() -> None:
    ranges, shown = Ranges(), Annotations()
    with torch.profiler.profile() as recorded:
        with ranges("unheard"):
            pass
        ranges.add(shown)
        with ranges("forward"), ranges("routing"):
            torch.ones(3) + 1
        ranges.remove(shown)
        with ranges("unheard"):
            pass
    events = {event.name: event for event in recorded.events()}
    assert "unheard" not in events
    outer, inner = events["forward"].time_range, events["routing"].time_range
    assert outer.start <= inner.start < inner.end <= outer.end
    assert inner.start <= events["aten::add"].time_range.start


def test_on_cuda_they_are_nvtx_ranges_too(monkeypatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("end"))
    ranges = Ranges()
    ranges.add(Annotations())
    with ranges("forward"), ranges("routing"):
        pass
    assert calls == ["forward", "routing", "end", "end"]
