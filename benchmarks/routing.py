"""What routing costs: from hidden states to scores, to the selection, to permutation indices.

Three parts, each timed on its own, for AdaMoE's router and dispatcher and for Megatron's, in one process:

* scores: the router's matrix product;
* selection: top-k, weights, map, and what is attached or counted there in training;
* planning: the dispatcher's preprocessing. It is timed with rows of width 1, so that gathering the rows, which is no
  routing, costs next to nothing; both dispatchers compute every index and size that they use.

Shares are of this project's layer, and for Megatron's lines of Megatron's own layer. Operators and their own CPU time
are the profiler's; wall time is taken without it, and what no operator accounts for is Python and launches. (The
profiler slows operators a little, so that small remainders can come out below zero.)
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
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
    ranks,
    report,
    seconds,
)
from torch.autograd import DeviceType

from adamoe_dist.console import run_tool

Times = dict[str, float]


@dataclass
class Routing:
    """One layer's routing; times are medians, in seconds."""

    variant: str
    times: Times
    """``scores``, ``selection``, ``planning``; ``routing`` (all three) and ``layer``, each also ``..._backward``:
    forward and backward together."""
    profile: dict[str, float]
    """Of routing's forward: ``operators`` (outermost calls), ``all_operators``, ``operator_seconds``."""
    ratios: list[float]
    """Routing's forward over the baseline's, pair by pair."""

    @property
    def overhead_seconds(self) -> float:
        """Wall time of routing's forward that no operator accounts for."""
        return self.times["routing"] - self.profile["operator_seconds"]


class Steps:
    """The pieces of one layer that are timed."""

    def __init__(self, layer: Any, hidden: torch.Tensor) -> None:
        self.layer, self.hidden = layer, hidden
        self.narrow = hidden.detach()[..., :1].contiguous()
        self.logits = layer.router.gating(hidden).detach().requires_grad_()
        probs, self.map = layer.router.routing(self.logits)
        self.probs = probs.detach().requires_grad_()
        generator = torch.Generator().manual_seed(5)
        self.cotangent = torch.randn(self.probs.shape, generator=generator).to(self.probs)

    def scores(self) -> torch.Tensor:
        """Score the tokens."""
        return self.layer.router.gating(self.hidden)

    def selection(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Select from given scores."""
        return self.layer.router.routing(self.logits)

    def planning(self) -> None:
        """Plan the dispatch of a given selection."""
        self.layer.token_dispatcher.dispatch_preprocess(self.narrow, self.map, self.probs)

    def routing(self) -> torch.Tensor:
        """Do all three, each on the one before."""
        probs, routing_map = self.layer.router(self.hidden)
        self.layer.token_dispatcher.dispatch_preprocess(self.narrow, routing_map, probs)
        return probs

    def routing_backward(self) -> None:
        """Do all three and the way back to router weights and hidden states."""
        clear_gradients(self.layer, self.hidden)
        probs = self.routing()
        probs.backward(self.cotangent)

    def layer_forward(self) -> None:
        """Run the whole layer forward, as in training."""
        self.layer(self.hidden)

    def layer_backward(self) -> None:
        """Run the whole layer forward and backward."""
        forward_backward(self.layer, self.hidden)

    def pieces(self) -> dict[str, Callable[[], object]]:
        """Return everything that is timed, by name."""
        return {
            "scores": self.scores,
            "selection": self.selection,
            "planning": self.planning,
            "routing": self.routing,
            "routing_backward": self.routing_backward,
            "layer": self.layer_forward,
            "layer_backward": self.layer_backward,
        }


def median_times(steps: Steps, repeats: int) -> Times:
    """Return the median time of each piece; they take turns, so that a busy moment falls on all of them."""
    pieces = steps.pieces()
    for work in pieces.values():
        work()
    rounds = [{name: seconds(work) for name, work in pieces.items()} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in pieces}


def profile(work: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Count operators and sum their own CPU time in one call of ``work``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(repeats):
            work()
    events = [e for e in profiler.events() or [] if e.device_type == DeviceType.CPU and e.name.startswith("aten::")]
    return {
        "operators": sum(e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in events) / repeats,
        "all_operators": len(events) / repeats,
        "operator_seconds": sum(e.self_cpu_time_total for e in events) * 1e-6 / repeats,
    }


def measure(options: Any) -> list[list[Routing]]:
    """Measure each group of variants; the first of a group is its baseline, Megatron's."""
    n = options.experts
    hidden = hidden_states(options.tokens, options.hidden)
    inner = {"expert_hidden_size": options.expert_hidden}
    groups: list[dict[str, Callable[[], Any]]] = [
        {
            "Megatron top-2": partial(build_megatron_layer, {**baseline_moe(n, 2), **inner}, options.hidden),
            "m=0 k=2": partial(build_layer, {**adamoe_moe(n, 0, 2), **inner}, options.hidden),
        },
        {
            "Megatron top-8": partial(build_megatron_layer, {**baseline_moe(n, 8), **inner}, options.hidden),
            f"m={n} k=8": partial(build_layer, {**adamoe_moe(n, n, 8), **inner}, options.hidden),
        },
    ]
    results = []
    for group in groups:
        measured: list[Routing] = []
        first: Steps | None = None
        for name, build in group.items():
            built = build()
            steps = Steps(built[0] if isinstance(built, tuple) else built, hidden)
            first = first or steps
            times = median_times(steps, options.repeats)
            ratios = _ratios(steps, first, options.repeats)
            measured.append(Routing(name, times, profile(steps.routing), ratios))
        results.append(measured)
    return results


def _ratios(steps: Steps, baseline: Steps, pairs: int) -> list[float]:
    ratios = []
    for pair in range(pairs):
        order = (steps, baseline) if pair % 2 == 0 else (baseline, steps)
        times = [seconds(each.routing) for each in order]
        ratios.append(times[pair % 2] / times[1 - pair % 2])
    return ratios


def parts_table(rows: list[Routing]) -> str:
    """Return where the time goes."""
    header = (
        "ms",
        "scores",
        "selection",
        "planning",
        "routing, all",
        f"/ {rows[0].variant} (range)",
        "share of the layer, forward",
        "forward + backward",
    )
    body = []
    for row in rows:
        times = row.times
        parts = [f"{times[name] * 1e3:.2f}" for name in ("scores", "selection", "planning", "routing")]
        shares = [times["routing"] / times["layer"], times["routing_backward"] / times["layer_backward"]]
        low, high, middle = min(row.ratios), max(row.ratios), statistics.median(row.ratios)
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        body.append((row.variant, *parts, ratio, *(f"{share:.1%}" for share in shares)))
    return markdown(header, body)


def operators_table(groups: list[list[Routing]]) -> str:
    """Return what routing's forward is made of."""
    header = ("routing, forward", "operators", "with nested", "wall ms", "operators' own ms", "Python and launches ms")
    body = [
        (
            row.variant,
            f"{row.profile['operators']:.0f}",
            f"{row.profile['all_operators']:.0f}",
            f"{row.times['routing'] * 1e3:.2f}",
            f"{row.profile['operator_seconds'] * 1e3:.2f}",
            f"{row.overhead_seconds * 1e3:.2f}",
        )
        for group in groups
        for row in group
    ]
    return markdown(header, body)


def main(argv: list[str]) -> int:
    """Measure and print where routing's time goes."""
    parser = BenchmarkParser("Milliseconds, operators and share of routing in one MoE layer; one process.")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a pass")
    parser.add_argument("--hidden", type=int, default=1024, help="H")
    parser.add_argument("--experts", type=int, default=64, help="n: true experts")
    parser.add_argument("--expert-hidden", type=int, default=256, help="inner width of an expert")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each piece")
    options = parser.parse_args(argv)
    with ranks():
        groups = measure(options)
        tables = [*map(parts_table, groups), operators_table(groups)]
        report(options, tables, {"groups": [[asdict(row) for row in group] for group in groups]})
    return 0


if __name__ == "__main__":
    run_tool(main)
