"""What measuring costs a training step: the clock of the phases, and traces."""

import argparse
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
from common import BenchmarkParser, Pairs, adamoe_moe, in_pairs, markdown, ranks, report

from adamoe_dist import platform
from adamoe_dist.config import Config, config_from_dict, resolve
from adamoe_dist.console import run_tool
from adamoe_dist.data import MicroBatch
from adamoe_dist.model import build_model
from adamoe_dist.parallel import Schedule, TrainingEngine
from adamoe_dist.timing import DATA, OPTIMIZER, Annotations, PhaseClock, Ranges

VOCABULARY = 512
CALLS = 20_000
CLOCK = "the clock"


@dataclass(frozen=True)
class Count:
    """The ranges of a step, and what one of them costs by itself."""

    ranges: int
    heard_us: float
    """Of one range, with the clock listening."""
    unheard_us: float
    """Of one range, with nobody listening."""


class Counter:
    """Counts ranges."""

    def __init__(self) -> None:
        self.ranges = 0

    def enter(self, name: str) -> None:
        """Count one."""
        self.ranges += 1

    def leave(self) -> None:
        """Do nothing."""


class Steps:
    """A small model's training steps, as the loop makes them."""

    def __init__(self, options: argparse.Namespace) -> None:
        config = config_from_dict(
            {
                "model": {
                    "hidden_size": options.hidden,
                    "num_layers": options.layers,
                    "num_attention_heads": 4,
                    "sequence_length": options.sequence,
                },
                "moe": {**adamoe_moe(8, 8, 3), "expert_hidden_size": 2 * options.hidden},
                "data": {"tokenizer": "none", "train": [{"path": "none"}]},
                "optimizer": {"implementation": "torch"},
                "train": {"global_batch_size": options.samples, "micro_batch_size": options.samples // 2},
            }
        )
        resolved = resolve(config, 1)
        device, dtype = platform.device(), torch.float32
        model = build_model(config, resolved, VOCABULARY, dtype, platform.is_cuda()).model
        self.ranges, self.device = Ranges(), device
        for layer in model.moe_layers:
            layer.ranges = self.ranges
        self._model = model
        self._engine = TrainingEngine(model, config, resolved, dtype, config.moe.num_experts)
        self._schedule = Schedule(self._engine, model, dtype, device, self.ranges)
        tokens = torch.randint(VOCABULARY, (options.samples, options.sequence + 1))
        self._parts = tokens.split(options.samples // 2)

    def __call__(self) -> None:
        """Make one."""
        for layer in self._model.moe_layers:
            layer.counters.reset()
        self._engine.train()
        with self.ranges(DATA):
            batches = [MicroBatch(part.to(self.device)) for part in self._parts]
        self._schedule.run(batches)
        with self.ranges(OPTIMIZER):
            self._engine.step()
        platform.synchronize()

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()


def clocked(step: Steps) -> Callable[[], None]:
    """Return a step with the clock of the phases, as one that is recorded has."""
    clock = PhaseClock()

    def run() -> None:
        step.ranges.add(clock)
        step()
        step.ranges.remove(clock)
        clock.take()

    return run


def traced(step: Steps, memory: bool) -> Callable[[], None]:
    """Return a step of which torch's profiler makes a trace; writing it is not in the time."""
    annotations = Annotations()

    def run() -> None:
        step.ranges.add(annotations)
        with torch.profiler.profile(activities=platform.profiled_activities(), profile_memory=memory):
            step()
        step.ranges.remove(annotations)

    return run


def count_of(step: Steps) -> Count:
    """Count the ranges of a step and time one of them."""
    counter, clock, alone = Counter(), PhaseClock(), Ranges()
    step.ranges.add(counter)
    step()
    step.ranges.remove(counter)
    statement = "with ranges('routing'): pass"
    unheard = min(timeit.repeat(statement, globals={"ranges": alone}, number=CALLS, repeat=5)) / CALLS
    alone.add(clock)
    heard = min(timeit.repeat(statement, clock.take, globals={"ranges": alone}, number=CALLS, repeat=5)) / CALLS
    return Count(counter.ranges, heard * 1e6, unheard * 1e6)


def table_of(rows: dict[str, Pairs], interval: int) -> str:
    """Return the table of the pairs."""
    lines = []
    for name, pairs in rows.items():
        record = pairs.record()
        low, middle, high = (record[f"ratio_{part}"] for part in ("low", "median", "high"))
        lines.append(
            (
                name,
                f"{record['seconds'] * 1e3:.1f}",
                f"{record['baseline_seconds'] * 1e3:.1f}",
                f"{middle:.3f} ({low:.3f}-{high:.3f})",
                f"{100 * (middle - 1) / interval:+.2f} %" if name == CLOCK else "-",
                record["pairs"],
            )
        )
    header = ("a step with", "ms", "ms without", "ratio (range)", f"of the time, one step in {interval}", "pairs")
    return markdown(header, lines)


def count_table(count: Count, step_s: float) -> str:
    """Return what the ranges of a step cost by themselves."""
    rows = [
        (name, count.ranges, f"{each:.2f}", f"{count.ranges * each:.0f}", f"{count.ranges * each / step_s / 1e4:.3f} %")
        for name, each in ((CLOCK, count.heard_us), ("nobody", count.unheard_us))
    ]
    return markdown(("who listens", "ranges a step", "us a range", "us a step", "of the step"), rows)


def main(argv: list[str]) -> int:
    """Measure and print both tables."""
    parser = BenchmarkParser("What the clock of the phases and traces cost a small model's training step; one process.")
    parser.add_argument("--hidden", type=int, default=128, help="H")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=128, help="tokens a sample")
    parser.add_argument("--samples", type=int, default=8, help="samples a step, in two micro-batches")
    parser.add_argument("--pairs", type=int, default=40, help="timed pairs; of traces a quarter of them")
    options = parser.parse_args(argv)
    interval = Config().monitor.log_interval
    with ranks():
        step = Steps(options)
        few = max(options.pairs // 4, 1)
        rows = {
            "nothing more (how far two equal steps differ)": in_pairs(step, step, options.pairs),
            CLOCK: in_pairs(clocked(step), step, options.pairs),
            "a trace": in_pairs(traced(step, memory=False), step, few),
            "a trace with allocations": in_pairs(traced(step, memory=True), step, few),
        }
        count = count_of(step)
        baseline_s = rows[CLOCK].record()["baseline_seconds"]
        tables = [table_of(rows, interval), count_table(count, baseline_s)]
        records: dict[str, Any] = {name: pairs.record() for name, pairs in rows.items()}
        report(options, tables, {"rows": records, "count": vars(count)})
        step.close()
    return 0


if __name__ == "__main__":
    run_tool(main)
