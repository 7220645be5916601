"""Saving and loading a checkpoint against plain ``torch.save`` of the same bytes.

Each row is a model in fresh processes, data parallel with ZeRO-1, its experts spread over all ranks::

    python benchmarks/checkpoint.py --directory /fast/disk
    python benchmarks/checkpoint.py --hidden 2048 --layers 4 --pairs 1

*Plain* is what each rank writes of the checkpoint (fp32 weights and both Adam moments), in one ``torch.save`` and an
``fsync`` a rank, and nothing else; it is read back by ``torch.load`` without memory mapping. A save *on the spot* has
all that a checkpoint has: gathering from ZeRO's shards, index, hashes, ``fsync``, rename. Of a save in the *background*
the stall is what training waits for; beside it stands how long the writing took and how much slower a step is
meanwhile. All are taken in turn, ``--pairs`` times, and ratios from pair to pair. Files are read from the page cache.
*Extra memory* is the peak of a rank's resident memory above what it had before.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
from common import BenchmarkParser, markdown, report
from processes import forget_resident_peak, free_at_once, resident, run_ranks
from torch import distributed as dist

from adamoe_dist import platform
from adamoe_dist.checkpoint import CheckpointSaver, Retention, find_checkpoint, load_checkpoint, take_snapshot
from adamoe_dist.config import Config, Resolved, config_from_dict, resolve
from adamoe_dist.console import run_tool
from adamoe_dist.model import build_model
from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups

VOCABULARY = 8192
LENGTH = 64
COLUMNS = (
    "plain save",
    "on the spot",
    "stall in background",
    "written in background",
    "step",
    "step meanwhile",
    "plain load",
    "load",
)


@dataclass
class Times:
    """Seconds of each pair, the longest of the ranks; what a rank's memory rose by, in bytes."""

    parameters: int
    bytes: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Take the longest of the ranks. Collective."""
        self.seconds[name].append(_largest(seconds))


def _tree(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    model = {"hidden_size": options.hidden, "num_layers": options.layers, "num_attention_heads": 8}
    return {
        "model": {**model, "sequence_length": LENGTH},
        "moe": {"num_experts": 8, "num_null_experts": 8, "top_k": 3, "expert_hidden_size": 2 * options.hidden},
        "parallel": {"expert": ranks},
        "zero": {"stage": 1},
        "optimizer": {"implementation": "torch"},
        "data": {"tokenizer": "none", "train": [{"path": "none"}]},
        "train": {"global_batch_size": ranks, "micro_batch_size": 1},
    }


class Bench:
    """One rank: an engine that has done a step, and what is timed on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.launch = Launch.from_environment()
        self.config: Config = config_from_dict(_tree(options, self.launch.world_size))
        self.resolved: Resolved = resolve(self.config, self.launch.world_size)
        platform.limit_threads()
        initialize_groups(self.launch, self.resolved)
        free_at_once()
        model = build_model(self.config, self.resolved, VOCABULARY, torch.float32, platform.is_cuda()).model
        self.engine = TrainingEngine(model, self.config, self.resolved, torch.float32, self.config.moe.num_experts)
        self.step()
        self.folder = Path(options.folder)
        self.own = self.folder / f"plain{self.launch.rank}.pt"
        savers = {"on the spot": False, "in background": True}
        self.savers = {
            name: CheckpointSaver(self.folder / name.replace(" ", "_"), Retention(1), background, False)
            for name, background in savers.items()
        }
        self.number = 0
        held = take_snapshot(0, self.engine, {}, {}, {})
        dense = sum(p.numel() for p in model.parameters() if not getattr(p, "is_expert", False))
        experts = sum(p.numel() for p in model.parameters()) - dense
        self.times = Times(dense + experts * self.launch.world_size, round(_total(held.written_bytes)))

    def step(self) -> None:
        """Do one training step."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=generator).to(platform.device())
        self.engine.start_step(1)
        self.engine.backward(self.engine(tokens).mean())
        self.engine.step()
        platform.synchronize()

    def save_plainly(self) -> None:
        """Write this rank's bytes: they are copied before the clock starts."""
        snapshot = take_snapshot(0, self.engine, {}, {}, {})
        held = {name: part.data for name, part in snapshot.tensors.items() if part.data is not None}
        self._time("plain save", lambda: _save(held, self.own))

    def save(self, name: str) -> None:
        """Save on the spot, or in the background with steps beside it until it is written."""
        self.number += 1
        saver = self.savers[name]

        def begin() -> None:
            saver.save(self.number, self.engine, {}, self.config.to_dict(), {})

        if name == "on the spot":
            self._time(name, begin)
            return
        self._time("step", self.step)
        self._time("stall in background", begin)
        beside, written = [], 0.0
        while not _smallest(written):
            started = time.perf_counter()
            self.step()
            beside.append(time.perf_counter() - started)
            saver.poll()
            written += saver.take_times().write_s
        self.times.add("written in background", written)
        self.times.add("step meanwhile", statistics.median(beside))

    def load(self) -> None:
        """Read both back."""
        self._time("plain load", lambda: torch.load(self.own, weights_only=True))
        path = find_checkpoint("auto", self.savers["on the spot"].root)
        assert path is not None
        self._time("load", lambda: load_checkpoint(path, self.engine))

    def _time(self, name: str, action: Callable[[], Any]) -> None:
        dist.barrier()
        before = resident("VmRSS")
        forget_resident_peak()
        started = time.perf_counter()
        action()
        self.times.add(name, time.perf_counter() - started)
        self.times.extra[name] = max(self.times.extra.get(name, 0.0), _largest(resident("VmHWM") - before))


def _save(held: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(held, file)
        file.flush()
        os.fsync(file.fileno())


def _reduced(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    reduced = torch.tensor(value, dtype=torch.float64, device=platform.device())
    dist.all_reduce(reduced, op=operation)
    return float(reduced)


def _largest(value: float) -> float:
    return _reduced(value, dist.ReduceOp.MAX)


def _smallest(value: float) -> float:
    return _reduced(value, dist.ReduceOp.MIN)


def _total(value: float) -> float:
    return _reduced(value, dist.ReduceOp.SUM)


def measure(options: argparse.Namespace) -> Times:
    """Measure on this rank. Collective."""
    bench = Bench(options)
    for _ in range(options.pairs):
        bench.save_plainly()
        bench.save("on the spot")
        bench.save("in background")
        bench.load()
    bench.engine.close()
    destroy_groups()
    return bench.times


def rows_of(times: Times) -> list[list[str]]:
    """Return the table's rows: seconds, speed, ratio to plain, extra memory."""
    plain = {name: times.seconds["plain load" if "load" in name else "plain save"] for name in COLUMNS}
    rows = []
    for name in COLUMNS:
        seconds = times.seconds[name]
        is_step = name.startswith("step")
        compared = times.seconds["step"] if is_step else plain[name]
        ratios = [ours / theirs for ours, theirs in zip(seconds, compared, strict=True)]
        speed = "" if is_step or "stall" in name else f"{times.bytes / statistics.median(seconds) / 1e9:.2f}"
        extra = f"{times.extra[name] / 2**20:.0f}" if name in times.extra and not is_step else ""
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([name, f"{statistics.median(seconds):.2f}", speed, spread, extra])
    return rows


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = BenchmarkParser("Saving and loading a checkpoint against plain torch.save of the same bytes.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="the disk to write to")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.folder:
        print(json.dumps(asdict(measure(options))), flush=True)
        return 0
    folder = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        size = ["--ranks", options.ranks, "--hidden", options.hidden, "--layers", options.layers]
        arguments = [*map(str, [*size, "--pairs", options.pairs]), "--folder", str(folder)]
        times = Times(**json.loads(run_ranks(__file__, arguments, options.ranks)))
    finally:
        shutil.rmtree(folder)
    title = f"{times.parameters / 1e6:.0f} million parameters, {times.bytes / 1e9:.2f} GB, {options.ranks} ranks"
    header = [title, "s", "GB/s", "ratio to plain (steps: to a step)", "extra MiB a rank"]
    report(options, [markdown(header, rows_of(times))], {"times": asdict(times), "ranks": options.ranks})
    return 0


if __name__ == "__main__":
    run_tool(main)
