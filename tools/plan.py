"""Plan a run on paper: memory, rows, bytes, the time of a step, and the layout that is fastest."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from adamoe_dist.config import Config, load_config
from adamoe_dist.console import ToolParser, progress, run_tool, say
from adamoe_dist.errors import UserError
from adamoe_dist.planning import (
    DEVICES,
    Assumptions,
    Cluster,
    Found,
    Load,
    Plan,
    Point,
    as_json,
    assumption_lines,
    count_layouts,
    make_plan,
    plan_lines,
    read_assumptions,
    search,
    search_table,
    shortage,
    sweep,
    sweep_table,
    write_config,
    write_slurm,
)

ROOT = Path(__file__).resolve().parents[1]


def _parser() -> ToolParser:
    parser = ToolParser(
        "Predict what a run holds, sends and takes on a cluster, without building anything. Every assumption is "
        "printed and can be changed; docs/planning.md says where the numbers come from and how well they hold."
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to override; values are YAML")
    _add_cluster(parser)
    parser.add_argument("--load", type=float, metavar="L", help="true experts a token; default: as configured")
    parser.add_argument("--all-null-share", type=float, metavar="S", help="part of the tokens without a true expert")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="metrics.jsonl of a run: its load, second half")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="default: the configured tokenizer's")
    parser.add_argument("--assume", nargs="+", default=[], metavar="NAME=VALUE", help="assumptions to change")
    parser.add_argument("--assumptions", type=Path, metavar="FILE", help="file of NAME=VALUE lines")
    parser.add_argument("--search", action="store_true", help="rank all valid layouts by predicted tokens/s")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts shown by --search")
    parser.add_argument("--sweep", action="store_true", help="null experts against top-k up to ten thousand ranks")
    parser.add_argument("--write-config", type=Path, metavar="FILE", help="write the plan for launch/pretrain.py")
    parser.add_argument("--write-slurm", type=Path, metavar="FILE", help="write a Slurm file; needs --write-config")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="devices, so ranks, of each")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h100", help="device (cpu: a core)")
    for option, unit, meaning in (
        ("--intra-node-GBps", "X", "rate of a rank and direction within a node, GB/s"),
        ("--inter-node-GBps", "X", "rate of a rank and direction between nodes, GB/s"),
        ("--memory-GiB", "M", "memory of a device"),
        ("--peak-TFLOPS", "P", "matrix products of a device, in the precision of the run"),
    ):
        parser.add_argument(option, type=float, metavar=unit, help=f"{meaning}; default: the device's")


def _cluster(options: argparse.Namespace) -> Cluster:
    for name in ("nodes", "gpus_per_node", "top", "vocab_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    changes: dict[str, Any] = {}
    for option, fields in (
        ("intra_node_GBps", ("intra_node_gb_s",)),
        ("inter_node_GBps", ("inter_node_gb_s",)),
        ("memory_GiB", ("memory_gib",)),
        ("peak_TFLOPS", ("peak_tflops_16", "peak_tflops_32")),
    ):
        value = getattr(options, option)
        if value is None:
            continue
        if not 0 < value < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} {value:g}: must be above 0")
        changes.update(dict.fromkeys(fields, value))
    device = dataclasses.replace(DEVICES[options.gpu], **changes)
    return Cluster(nodes=options.nodes, gpus_per_node=options.gpus_per_node, device=device)


def _load(options: argparse.Namespace, config: Config) -> Load:
    if options.measured is not None:
        if options.load is not None or options.all_null_share is not None:
            raise UserError("--measured gives the load; leave out --load and --all-null-share")
        return _measured_load(options.measured)
    expected = Load.expected(config).true_experts_per_token
    load = expected if options.load is None else options.load
    return Load(true_experts_per_token=load, all_null_share=options.all_null_share)


def _measured_load(path: Path) -> Load:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if "true_experts_per_token" in record]
    except (OSError, ValueError) as problem:
        raise UserError(f"--measured {path}: cannot be read ({problem}); give the metrics.jsonl of a run") from None
    if not records:
        raise UserError(f"--measured {path}: holds no step; give the metrics.jsonl of a run")
    late = records[len(records) // 2 :]
    names = ("true_experts_per_token", "all_null_share")
    means = {name: sum(record[name] for record in late) / len(late) for name in names}
    return Load(**means)


def _vocab_size(options: argparse.Namespace, config: Config) -> int:
    path, preparation = Path(config.data.tokenizer), config.data.prepare
    if options.vocab_size is not None:
        return int(options.vocab_size)
    if path.exists():
        from adamoe_dist.data import Tokenizer

        return Tokenizer.load(path).vocab_size
    if not preparation.input and config.model.vocab_size is None:
        raise UserError(f"data.tokenizer={path}: no such tokenizer; make it, or give its size with --vocab-size")
    return config.model.vocab_size or preparation.vocab_size


def _search(
    options: argparse.Namespace, config: Config, cluster: Cluster, assumptions: Assumptions, load: Load
) -> Found:
    with progress(count_layouts(config, cluster), "layouts", "planning") as bar:
        return search(config, cluster, assumptions, _vocab_size(options, config), load, advance=bar.update)


def _sweep(
    options: argparse.Namespace, config: Config, cluster: Cluster, assumptions: Assumptions, load: Load
) -> list[Point]:
    with progress(None, "models", "planning") as bar:
        return list(sweep(config, cluster, assumptions, _vocab_size(options, config), load, bar.update))


def _say(options: argparse.Namespace, plan: Plan, found: Found | None, points: list[Point]) -> None:
    if options.json:
        answer = as_json(plan)
        if found is not None:
            answer["search"] = [as_json(fitting) for fitting in found.fitting[: options.top]]
        if points:
            answer["sweep"] = [{"model": p.model, "plan": p.plan and as_json(p.plan)} for p in points]
        say(json.dumps(answer))
        return
    tables = search_table(found, options.top) if found else []
    tables += sweep_table(points) if points else []
    for line in [*tables, *plan_lines(plan), "assumptions:", *("  " + line for line in assumption_lines(plan))]:
        say(line)


def main(argv: list[str]) -> None:
    """Plan as the command line says."""
    options = _parser().parse_intermixed_args(argv)
    config = load_config(options.config, options.overrides)
    cluster, load = _cluster(options), _load(options, config)
    if options.write_slurm and not options.write_config:
        raise UserError(f"--write-slurm {options.write_slurm}: the job needs a configuration; add --write-config FILE")
    assumptions = read_assumptions(Assumptions.of(cluster.device), options.assumptions, options.assume)
    found = _search(options, config, cluster, assumptions, load) if options.search else None
    if found is None:
        plan = make_plan(config, cluster, assumptions, _vocab_size(options, config), load)
    else:
        plan = found.best()
    points = _sweep(options, config, cluster, assumptions, load) if options.sweep else []
    _say(options, plan, found, points)
    if not plan.fits:
        raise UserError(shortage(plan))
    if options.write_config:
        write_config(plan, options.write_config, options.overwrite)
    if options.write_slurm:
        template = ROOT / "launch" / "slurm.sbatch"
        write_slurm(plan, options.write_config, template, options.write_slurm, options.overwrite)


if __name__ == "__main__":
    run_tool(main)
