"""Predictions of tools/plan.py beside what was measured: memory, rows and bytes, steps over limited links.

It measures nothing itself, it plans what other commands have measured::

    python benchmarks/memory.py --json memory.json
    sudo python benchmarks/two_nodes.py --json two_nodes.json
    torchrun --nproc-per-node 2 launch/pretrain.py run.dir=runs/two monitor.log_interval=1
    python benchmarks/planned.py --memory memory.json --two-nodes two_nodes.json --runs runs/two

*Memory*: the planned state against live tensors, the planned peak against resident memory. *Rows*: of each quarter of a
run, planned from its load and its share of tokens without a true expert. *Steps*: computing is fitted to the unlimited
link, the others are predicted.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import BenchmarkParser, markdown, report
from memory import VOCABULARY, Case, tree_of
from two_nodes import configuration

from adamoe_dist.config import config_from_dict, load_config
from adamoe_dist.console import run_tool
from adamoe_dist.errors import UserError
from adamoe_dist.planning import DEVICES, Assumptions, Cluster, Load, Plan, calibrated, make_plan

CPU = Assumptions.of(DEVICES["cpu"])
ABOVE_THE_EMPTY_PROCESS = CPU.changed({"memory_overhead_gib": 0.025})
"""For memory.py, whose numbers are above what a rank's process had before the model."""
MIB = 2**20
RATES = {"unlimited": 2.0, "1gbit": 0.125, "200mbit": 0.025}
"""GB/s of each link; what is not limited is taken for loopback."""


def memory_table(path: Path) -> str:
    """Compare with benchmarks/memory.py's numbers."""
    content = json.loads(path.read_text(encoding="utf-8"))
    options = argparse.Namespace(**content["options"])
    cluster = Cluster(nodes=1, gpus_per_node=options.ranks, device=DEVICES["cpu"])
    rows = []
    for row in content["rows"]:
        case = Case(**row["case"])
        tree = tree_of(case, options)
        tree["train"]["precision"] = case.precision
        plan = make_plan(config_from_dict(tree), cluster, ABOVE_THE_EMPTY_PROCESS, VOCABULARY)
        host = plan.memory.state.host
        state, peak = plan.memory.state.total + host, plan.memory_gib * 2**30 + host
        live = row["weights"] + row["gradients"] + row["optimizer"]
        highest = max(row["peak_passes"], row["peak_step"])
        name = (case.stage, case.precision, "offloaded" if case.offload else "on device", case.recompute, case.length)
        rows.append((*name, *_compared(state / MIB, live, 0), *_compared(peak / MIB, highest, 0)))
    header = ("stage", "precision", "optimizer", "recompute", "length")
    return markdown((*header, "state planned", "live", "", "peak planned", "resident", ""), rows)


def rows_table(folder: Path) -> str:
    """Compare with the metrics of a run on one machine, given its directory."""
    try:
        config = load_config(folder / "config.yaml")
        ranks = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["world_size"]
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise UserError(f"--runs {folder}: {problem}; give the directory of a run") from None
    records = [record for record in map(json.loads, lines) if "dispatch_rows" in record]
    cluster = Cluster(nodes=1, gpus_per_node=ranks, device=DEVICES["cpu"])
    size, rows = max(1, len(records) // 4), []
    for first in range(0, size * 4, size):
        part = records[first : first + size]
        names = ("true_experts_per_token", "all_null_share", "dispatch_rows", "dispatch_bytes")
        load, nulls, sent, size_sent = (mean(record[name] for record in part) for name in names)
        vocabulary = config.model.vocab_size or config.data.prepare.vocab_size
        of_load = make_plan(config, cluster, CPU, vocabulary, Load(true_experts_per_token=load))
        of_both = make_plan(config, cluster, CPU, vocabulary, Load(true_experts_per_token=load, all_null_share=nulls))
        planned = of_both.rows.rows * of_both.rows_factor
        cells = (f"{part[0]['step']}-{part[-1]['step']}", f"{load:.3f}", f"{nulls:.1%}")
        alone = of_load.rows.rows * of_load.rows_factor / sent - 1
        bytes_off = of_both.rows.bytes * of_both.rows_factor / size_sent - 1
        rows.append((*cells, *_compared(planned, sent, 0), f"{alone:+.1%}", f"{bytes_off:+.1%}"))
    header = (f"steps, {ranks} ranks", "load", "tokens without a true expert", "rows planned", "rows", "")
    return markdown((*header, "from the load alone", "bytes"), rows)


def steps_table(path: Path) -> str:
    """Compare with benchmarks/two_nodes.py's numbers."""
    content = json.loads(path.read_text(encoding="utf-8"))
    options = argparse.Namespace(**content["options"])
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in content["runs"]:
        runs.setdefault((run["variant"], run["rate"]), []).append(run)
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in content["runs"]):
        config = config_from_dict(configuration(variant, Path("none"), options))
        load = Load(true_experts_per_token=median(r["load"] for r in content["runs"] if r["variant"] == variant))

        def planned(rate: str, assumptions: Assumptions, config: Any = config, load: Load = load) -> Plan:
            device = dataclasses.replace(DEVICES["cpu"], inter_node_gb_s=RATES[rate])
            return make_plan(config, Cluster(nodes=2, gpus_per_node=1, device=device), assumptions, 512, load)

        unlimited = median(run["step_s"] for run in runs[variant, "unlimited"])
        fitted = calibrated(planned("unlimited", CPU), unlimited)
        for rate in options.rates:
            plan, seen = planned(rate, fitted), runs[variant, rate]
            step, exchange = (median(run[name] for run in seen) for name in ("step_s", "exchange_s"))
            sent = median(run["rows"] for run in seen)
            cells = (*_compared(plan.time.total, step, 2), *_compared(plan.time.dispatch, exchange, 2))
            rows.append((rate, variant, *_compared(plan.rows.rows * plan.rows_factor, sent, 0), *cells))
    header = ("link", "model", "rows planned", "rows", "", "step planned s", "step s", "")
    return markdown((*header, "exchange planned s", "exchange s", ""), rows)


def _compared(planned: float, measured: float, digits: int) -> tuple[str, str, str]:
    return f"{planned:.{digits}f}", f"{measured:.{digits}f}", f"{planned / measured - 1:+.1%}"


def main(argv: list[str]) -> int:
    """Print a table for each kind of measurement that is given."""
    parser = BenchmarkParser("Predictions of tools/plan.py beside what other benchmarks and runs have measured.")
    parser.add_argument("--memory", type=Path, metavar="FILE", help="memory.py's --json")
    parser.add_argument("--two-nodes", type=Path, metavar="FILE", help="two_nodes.py's --json")
    parser.add_argument(
        "--runs", nargs="+", default=[], type=Path, metavar="DIRECTORY", help="runs that log every step"
    )
    options = parser.parse_args(argv)
    if not (options.memory or options.two_nodes or options.runs):
        raise UserError("nothing to compare with; give --memory, --two-nodes or --runs")
    tables = [memory_table(options.memory)] if options.memory else []
    tables += [rows_table(run) for run in options.runs]
    tables += [steps_table(options.two_nodes)] if options.two_nodes else []
    options.runs = [str(run) for run in options.runs]
    report(options, tables, {"tables": tables})
    return 0


if __name__ == "__main__":
    run_tool(main)
