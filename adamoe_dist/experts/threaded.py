"""The experts on CPU cores: each core takes one expert at a time, gradients written by hand.

A product with all cores on it waits for the slowest at its end, and an expert's products are small; whole experts side
by side need no waiting, and what lies between the products stays in each core's cache.

Legend: P rows sorted by expert, L local experts, H hidden size, F inner width of an expert.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_BYTES = 2**20
IMBALANCE = 1.15


def threaded_experts(rows_PH: Tensor, weight1: Tensor, weight2: Tensor, counts_L: Tensor, weights_P: Tensor) -> Tensor:
    """Compute weighted SwiGLU experts as :func:`adamoe_dist.experts.kernels.composed` does, on the CPU.

    Kept for backward: the rows, and the first product's (P, 2F). A core works on one expert, the largest first. Where
    whole experts cannot fill the cores evenly, each product uses all of them instead; the two agree to rounding.
    """
    assert rows_PH.device.type == "cpu", f"rows on {rows_PH.device}"
    return cast(Tensor, _Experts.apply(rows_PH, weight1, weight2, weights_P, counts_L.tolist()))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_PH: Tensor, weight1: Tensor, weight2: Tensor, weights_P: Tensor, counts: list[int]
    ) -> Tensor:
        inner = weight2.shape[2]
        hidden_P2F = rows_PH.new_empty(rows_PH.shape[0], 2 * inner)
        output_PH = torch.empty_like(rows_PH)

        def compute(expert: int, rows: slice) -> None:
            hidden = hidden_P2F[rows]
            torch.mm(rows_PH[rows], weight1[expert].t(), out=hidden)
            active = hidden.new_empty(hidden.shape[0], inner)
            for block in _blocks(hidden):
                gate, up = hidden[block].split(inner, dim=1)
                torch.mul(F.silu(gate), up, out=active[block])
                active[block].mul_(weights_P[rows][block].unsqueeze(1))
            torch.mm(active, weight2[expert].t(), out=output_PH[rows])

        _for_each_expert(compute, counts)
        ctx.save_for_backward(rows_PH, weight1, weight2, weights_P, hidden_P2F)
        ctx.counts = counts
        return output_PH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows_PH, weight1, weight2, weights_P, hidden_P2F = ctx.saved_tensors
        to_rows, to_weight1, to_weight2, _, _ = ctx.needs_input_grad
        gradient_PH = gradients[0].contiguous()
        row_gradient = torch.empty_like(rows_PH) if to_rows else None
        gradient1 = torch.empty_like(weight1) if to_weight1 else None
        gradient2 = torch.empty_like(weight2) if to_weight2 else None
        weight_gradient = torch.empty_like(weights_P)

        def compute(expert: int, rows: slice) -> None:
            gradient, hidden, weights = gradient_PH[rows], hidden_P2F[rows], weights_P[rows]
            active_gradient = torch.mm(gradient, weight2[expert])
            active = torch.empty_like(active_gradient)
            hidden_gradient = torch.empty_like(hidden)
            for block in _blocks(hidden):
                weight_gradient[rows][block] = _activation_gradient(
                    hidden[block], weights[block], active_gradient[block], active[block], hidden_gradient[block]
                )
            if gradient2 is not None:
                torch.mm(gradient.t(), active, out=gradient2[expert])
            if row_gradient is not None:
                torch.mm(hidden_gradient, weight1[expert], out=row_gradient[rows])
            if gradient1 is not None:
                torch.mm(hidden_gradient.t(), rows_PH[rows], out=gradient1[expert])

        _for_each_expert(compute, ctx.counts)
        for expert in (expert for expert, count in enumerate(ctx.counts) if count == 0):
            for unused in (gradient1, gradient2):
                if unused is not None:
                    unused[expert].zero_()
        return row_gradient, gradient1, gradient2, weight_gradient, None


def _activation_gradient(
    hidden: Tensor, weights: Tensor, gradient: Tensor, active: Tensor, hidden_gradient: Tensor
) -> Tensor:
    """Go back through ``active = silu(gate) * up * weight`` for a block of rows.

    Writes ``active`` and ``hidden_gradient``, scales ``gradient`` and returns the gradient of the weights.
    """
    inner = active.shape[1]
    gate, up = hidden.split(inner, dim=1)
    gate_gradient, up_gradient = hidden_gradient.split(inner, dim=1)
    activated = F.silu(gate)
    torch.mul(activated, up, out=active)
    precise = weights.dtype
    weight_gradient = torch.linalg.vecdot(gradient.to(precise), active.to(precise))
    active.mul_(weights.unsqueeze(1))
    gradient.mul_(weights.unsqueeze(1))
    torch.mul(gradient, activated, out=up_gradient)
    torch.ops.aten.silu_backward.grad_input(gradient.mul_(up), gate, grad_input=gate_gradient)
    return weight_gradient


def _blocks(hidden: Tensor) -> Sequence[slice]:
    """Slices of rows whose numbers fit a core's cache."""
    size = max(CACHE_BYTES // (hidden.shape[1] * hidden.element_size()), 16)
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _for_each_expert(compute: Callable[[int, slice], None], counts: list[int]) -> None:
    """Call ``compute(expert, its rows)`` for every expert that has rows, side by side where that fills the cores."""
    ends = list(itertools.accumulate(counts))
    ranges = {e: slice(end - count, end) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count}
    order = sorted(ranges, key=lambda expert: counts[expert], reverse=True)
    threads = torch.get_num_threads()

    def task(expert: int) -> None:
        with torch.no_grad():
            compute(expert, ranges[expert])

    if threads == 1 or not _fills_evenly([counts[expert] for expert in order], threads):
        for expert in order:
            task(expert)
        return
    for _ in _team(threads).map(task, order):
        pass


def _fills_evenly(sizes: Sequence[int], threads: int) -> bool:
    """Whether tasks, taken largest first by whoever is free, keep all threads busy nearly to the end."""
    loads = [0] * threads
    for size in sizes:
        loads[loads.index(min(loads))] += size
    return bool(sizes) and max(loads) * threads <= IMBALANCE * sum(sizes)


@functools.cache
def _team(threads: int) -> ThreadPoolExecutor:
    """As many threads as the caller may use, each computing alone; kept for the life of the process."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # before it, a thread's first product would set the number again
        torch.set_num_threads(1)
        started.wait()

    team = ThreadPoolExecutor(threads, "experts", initializer=start)
    for _ in range(threads):
        team.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # the default of threads to come, which the team has changed
    return team
