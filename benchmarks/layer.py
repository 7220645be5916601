"""Time of one MoE layer, forward and backward, against Megatron's own layer and against its floor.

On one process or several::

    python benchmarks/layer.py
    torchrun --nproc-per-node 2 benchmarks/layer.py

The baseline is Megatron's MoE layer as it is: TopKRouter with k = 2, its all-to-all dispatcher, its experts. A layer's
floor is one dense product, forward and backward, with the FLOPs of the rows that it computes: no routing, no moving of
rows, no activation function. A round times the floors, the baseline and each layer one after the other, in an order
that turns from round to round; ratios are taken within a round. Peak memory is what one forward and backward allocates
above the weights and the input, gradients included.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    BenchmarkParser,
    adamoe_moe,
    baseline_moe,
    build_layer,
    build_megatron_layer,
    clear_gradients,
    forward_backward,
    hidden_states,
    markdown,
    peak_bytes,
    ranks,
    report,
    seconds,
    show_range,
)

from adamoe_dist.console import run_tool

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """One layer at one size; times in seconds, the slowest rank's."""

    precision: str
    experts: int
    layer: str
    load: float
    seconds: float
    over_floor: list[float]
    over_megatron: list[float]
    peak_mib: float


def variants(num_experts: int) -> dict[str, dict[str, Any]]:
    """Return the ``moe`` sections that are measured, the baseline first."""
    n = num_experts
    return {
        "Megatron top-2": baseline_moe(n, 2),
        "m=0 k=2": adamoe_moe(n, 0, 2),
        f"m={n} k=3": adamoe_moe(n, n, 3),
    }


def dense_product(rows: int, options: argparse.Namespace, dtype: torch.dtype) -> Callable[[], None]:
    """Return one product, forward and backward, with the FLOPs of ``rows`` through SwiGLU experts."""
    generator = torch.Generator().manual_seed(3)
    device = hidden_states(1, 1).device
    drawn = [
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((rows, options.hidden), (3 * options.expert_hidden, options.hidden))
    ]
    vectors, matrix = (value.requires_grad_() for value in drawn)
    cotangent = torch.ones(rows, 3 * options.expert_hidden, dtype=dtype, device=device)

    def product() -> None:
        vectors.grad = matrix.grad = None
        F.linear(vectors, matrix).backward(cotangent)

    return product


def true_rows(layer: torch.nn.Module, hidden: torch.Tensor) -> int:
    """Return how many (token, true expert) pairs the layer routes on this rank."""
    with torch.no_grad():
        return int(layer.route(hidden)[1].sum())  # type: ignore[operator]


def slowest(value: float) -> float:
    """Return the largest of all ranks' values."""
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return float(shared)


def measure(precision: str, num_experts: int, options: argparse.Namespace) -> list[Row]:
    """Measure all layers of one size and precision."""
    dtype = DTYPES[precision]
    hidden = hidden_states(options.tokens, options.hidden, dtype, seed=100 + dist.get_rank())
    layers: dict[str, torch.nn.Module] = {}
    for name, moe in variants(num_experts).items():
        moe = {**moe, "expert_hidden_size": options.expert_hidden}
        layers[name] = (
            build_layer(moe, options.hidden, dtype) if layers else build_megatron_layer(moe, options.hidden, dtype)[0]
        )
    rows = {name: true_rows(layer, hidden) for name, layer in layers.items()}
    work: dict[str, Callable[[], None]] = {
        f"floor of {name}": dense_product(count, options, dtype) for name, count in rows.items()
    }
    for name, layer in layers.items():
        work[name] = lambda layer=layer: forward_backward(layer, hidden)  # type: ignore[misc]
    times = timed_rounds(work, options.rounds)
    result = []
    for name, layer in layers.items():
        clear_gradients(layer, hidden)
        result.append(
            Row(
                precision,
                num_experts,
                name,
                rows[name] / options.tokens,
                statistics.median(times[name]),
                _ratios(times[name], times[f"floor of {name}"]),
                _ratios(times[name], times["Megatron top-2"]),
                peak_bytes(layer, hidden) / 2**20,
            )
        )
    return result


def timed_rounds(work: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time every piece of work once a round, after two rounds of warm-up; the order turns."""
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            took = slowest(seconds(work[name]))
            if turn >= 2:
                times[name].append(took)
    return times


def _ratios(measured: list[float], baseline: list[float]) -> list[float]:
    return [ours / theirs for ours, theirs in zip(measured, baseline, strict=True)]


def table(rows: list[Row]) -> str:
    """Return the table."""
    header = ["precision", "n", "layer", "true experts a token", "ms", "/ its floor", "/ Megatron top-2", "peak MiB"]
    lines = [
        [
            row.precision,
            row.experts,
            row.layer,
            f"{row.load:.2f}",
            f"{1e3 * row.seconds:.0f}",
            show_range(row.over_floor),
            show_range(row.over_megatron),
            f"{row.peak_mib:.0f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def main(argv: list[str]) -> int:
    """Measure every size and print the table on rank 0; return 0."""
    parser = BenchmarkParser("Time of one MoE layer against Megatron's own and against one dense product.")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--expert-hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="true experts a layer (n)")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    with ranks() as launch:
        rows = [row for p in options.precision for n in options.experts for row in measure(p, n, options)]
        if launch.rank == 0:
            report(options, [table(rows)], {"rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    run_tool(main)
