"""Training steps of two "nodes" over a slow link: AdaMoE (m = n, k = 3) against Megatron's top-2.

Needs root and iproute2. Two network namespaces are joined by a link of a given rate, one rank runs in each, and each
runs the product's own training program (:mod:`timed_pretrain` is launch/pretrain.py with a clock). Over the link go, in
every step, the expert exchange (rows out and back, forward and backward) and ZeRO's gradient reduction, which is the
same for both models. The claim is about the exchange, so its all-to-alls are timed themselves, from the moment when
both ranks are there; the difference to the step on an unlimited link would mix the two and the noise of both runs.

Sizes are such that the exchange is most of what travels: few dense weights, many tokens. Runs of the two models
alternate; ratios are taken pair by pair.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from common import BenchmarkParser, markdown, report, show_range
from network import ADDRESSES, DEVICE, TwoNodes, require_network_tools, signals_as_exits

from adamoe_dist.console import run_tool
from adamoe_dist.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PORT = 29500


@dataclass
class Run:
    """One training run, its first step left out."""

    variant: str
    rate: str
    step_s: float
    exchange_s: float
    """Median over the steps of the mean over the ranks."""
    rows: float
    """Hidden vectors that one step's forward dispatch sends to the other node, all layers."""
    load: float
    """True experts a token."""


VARIANTS: dict[str, dict[str, Any]] = {
    "AdaMoE": {"num_null_experts": 8, "top_k": 3},
    "Megatron top-2": {
        "num_null_experts": 0,
        "top_k": 2,
        "router": {"type": "topk", "balance": {"type": "switch", "coefficient": 0.01}},
    },
}


def configuration(variant: str, folder: Path, options: Any) -> dict[str, Any]:
    """Return a run's configuration; data is prepared by the first run."""
    return {
        "run": {"dir": str(folder / "run")},
        "model": {
            "num_layers": options.layers,
            "hidden_size": options.hidden,
            "num_attention_heads": max(1, options.hidden // 64),
            "sequence_length": options.sequence,
            "tie_embeddings": True,
        },
        "moe": {"num_experts": 8, "expert_hidden_size": options.expert_hidden, **VARIANTS[variant]},
        "optimizer": {"learning_rate": 1e-5},
        "data": {
            "train": [{"path": str(folder / "corpus_train")}],
            "tokenizer": str(folder / "tokenizer"),
            "prepare": {"input": [str(folder / "text")], "vocab_size": 512, "workers": 1},
        },
        "train": {
            "steps": options.steps + 1,
            "global_batch_size": 2 * options.tokens // options.sequence,
            "precision": "fp32",
        },
        "monitor": {"log_interval": 1, "tensorboard": False},
    }


def write_text(folder: Path) -> None:
    """Write the text that the runs train on: the running Python's own help topics."""
    from pydoc_data.topics import topics

    folder.mkdir()
    for number, (_, topic) in enumerate(sorted(topics.items())):
        (folder / f"{number:03d}.txt").write_text(topic, encoding="utf-8")


def train(nodes: TwoNodes, variant: str, rate: str, folder: Path, options: Any) -> Run:
    """Train one model over the link and return what a step took.

    Raises:
        RuntimeError: a node failed or did not finish in time; with the end of its log.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration(variant, folder, options)), encoding="utf-8")
    nodes.limit(rate)
    logs = [folder / f"node{node}.log" for node in (0, 1)]
    times = [folder / f"times{node}.json" for node in (0, 1)]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "timed_pretrain.py"), "--config"]
    processes = []
    for node in (0, 1):
        with logs[node].open("w") as output:
            environment = _environment(node) | {"EXCHANGE_TIMES": str(times[node]), "TMPDIR": str(folder)}
            processes.append(nodes.start(node, [*command, str(folder / "config.yaml")], environment, output))
    _wait(processes, logs, options.timeout)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    exchange = [_by_step(json.loads(path.read_text()), len(records)) for path in times]
    mean_S = [statistics.mean(ranks) for ranks in zip(*exchange, strict=True)]
    return Run(
        variant=variant,
        rate=rate,
        step_s=statistics.median(record["step_time_s"] for record in records[1:]),
        exchange_s=statistics.median(mean_S[1:]),
        rows=statistics.median(record["dispatch_rows"] for record in records[1:]),
        load=statistics.median(record["true_experts_per_token"] for record in records[1:]),
    )


def _environment(node: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(node),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }


def _wait(processes: list[subprocess.Popen[str]], logs: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        late = time.monotonic() > deadline
        if late or any(process.poll() for process in processes):
            break
        time.sleep(0.1)
    for node, process in enumerate(processes):
        code = process.poll()
        if code:
            raise RuntimeError(f"node {node} ended with exit code {code}:\n{logs[node].read_text()[-3000:]}")
    if any(process.poll() is None for process in processes):
        raise RuntimeError(f"the nodes did not finish in {timeout_s:.0f} s:\n{logs[0].read_text()[-3000:]}")


def _by_step(calls: list[float], steps: int) -> list[float]:
    """Sum the calls of each step: every step makes equally many."""
    each, rest = divmod(len(calls), steps)
    assert each and not rest, f"{len(calls)} all-to-alls in {steps} steps"
    return [sum(calls[step * each : (step + 1) * each]) for step in range(steps)]


def table(rate: str, pairs: list[tuple[Run, Run]]) -> str:
    """Return the table of one link rate."""
    header = (f"link {rate}", "rows a step", "step s", "exchange s", "rest of the step s")
    rows = []
    for place, variant in enumerate(VARIANTS):
        runs = [pair[place] for pair in pairs]
        rest = [run.step_s - run.exchange_s for run in runs]
        cells = ([run.step_s for run in runs], [run.exchange_s for run in runs], rest)
        rows.append((variant, f"{statistics.median(run.rows for run in runs):.0f}", *map(show_range, cells)))
    ratios = (
        [ours.step_s / theirs.step_s for ours, theirs in pairs],
        [ours.exchange_s / theirs.exchange_s for ours, theirs in pairs],
    )
    of_rows = [ours.rows / theirs.rows for ours, theirs in pairs]
    rows.append(("ratio, pair by pair", show_range(of_rows, 3), *(show_range(values, 3) for values in ratios), ""))
    return markdown(header, rows)


def verdict(rate: str, pairs: list[tuple[Run, Run]]) -> str:
    """Say whether the exchange shrinks as its rows do, to within 10 %."""
    excess = [(a.exchange_s / b.exchange_s) / (a.rows / b.rows) for a, b in pairs]
    holds = statistics.median(excess) <= 1.1
    return (
        f"{rate}: ratio of exchange times / ratio of rows {show_range(excess, 3)}; "
        f"at most 1.1: {'yes' if holds else 'NO'}"
    )


def measure(options: Any) -> dict[str, list[tuple[Run, Run]]]:
    """Run every pair at every rate; whatever was set up is taken down."""
    results: dict[str, list[tuple[Run, Run]]] = {}
    with signals_as_exits(), tempfile.TemporaryDirectory(prefix="two_nodes.") as name, TwoNodes() as nodes:
        folder = Path(name)
        write_text(folder / "text")
        for rate in options.rates:
            pairs = []
            for number in range(1 if rate == "unlimited" else options.pairs):
                order = list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS))
                runs = {variant: train(nodes, variant, rate, folder, options) for variant in order}
                pairs.append((runs["AdaMoE"], runs["Megatron top-2"]))
            results[rate] = pairs
    return results


def main(argv: list[str]) -> int:
    """Measure and print a table for each link rate."""
    parser = BenchmarkParser("Training steps of two nodes over a slow link; needs root and iproute2.")
    parser.add_argument("--rates", nargs="+", default=["unlimited", "1gbit", "200mbit"], help="link rates, as tc's")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs at each rate (unlimited: one)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each run, after one that is not")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a rank and step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a sample")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512, help="H")
    parser.add_argument("--expert-hidden", type=int, default=128, help="inner width of an expert")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each run")
    options = parser.parse_args(argv)
    require_network_tools()
    if options.tokens % options.sequence:
        raise UserError(f"--tokens {options.tokens} is not a multiple of --sequence {options.sequence}")
    results = measure(options)
    torch.set_num_threads(1)  # as each rank had, for the line that describes the machine
    tables = [table(rate, pairs) for rate, pairs in results.items()]
    verdicts = "\n".join(f"- {verdict(rate, pairs)}" for rate, pairs in results.items() if rate != "unlimited")
    runs = [asdict(run) for pairs in results.values() for pair in pairs for run in pair]
    report(options, [*tables, *filter(None, [verdicts])], {"runs": runs})
    return 0


if __name__ == "__main__":
    run_tool(main)
