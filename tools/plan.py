"""Plan a run on paper: memory, rows, bytes, the time of a step, and the layout that is fastest."""

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from adamoe_dist.config import Config, load_config, overridden_keys
from adamoe_dist.console import ToolParser, progress, run_tool, say
from adamoe_dist.errors import UserError
from adamoe_dist.files import check_output_files, write_files
from adamoe_dist.planning import (
    DEVICES,
    Assumptions,
    Cluster,
    Found,
    Load,
    Plan,
    Point,
    Space,
    as_json,
    assumption_lines,
    config_text,
    count_layouts,
    make_plan,
    plan_lines,
    planned_precision,
    read_assumptions,
    search,
    search_table,
    shortage,
    slurm_text,
    stage_table,
    stages_as_json,
    sweep,
    sweep_table,
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
    parser.add_argument("--assumptions", type=Path, metavar="FILE", help="YAML file of NAME: VALUE")
    parser.add_argument("--search", action="store_true", help="rank all valid layouts that keep the overrides")
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
    parser.add_argument("--gpu", type=str.lower, choices=sorted(DEVICES), default="h100", help="device (cpu: a core)")
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


def _outputs(options: argparse.Namespace) -> dict[str, Path]:
    """Return the files that are to be written by the option that names them, after all checks."""
    options_of = {"--write-config": options.write_config, "--write-slurm": options.write_slurm}
    paths = {option: path for option, path in options_of.items() if path is not None}
    if paths and options.sweep and not options.search:
        raise UserError(f"{next(iter(paths))}: a sweep has no plan to write; add --search, or leave out --sweep")
    if options.write_slurm and not options.write_config:
        raise UserError(f"--write-slurm {options.write_slurm}: the job needs a configuration; add --write-config FILE")
    check_output_files(paths.items(), options.overwrite)
    return paths


def _load(options: argparse.Namespace, config: Config) -> Load:
    if options.measured is not None:
        if options.load is not None or options.all_null_share is not None:
            raise UserError("--measured gives the load; leave out --load and --all-null-share")
        return _measured_load(options.measured)
    expected = Load.expected(config).true_experts_per_token
    load = expected if options.load is None else options.load
    return Load(true_experts_per_token=load, all_null_share=options.all_null_share)


def _measured_load(path: Path) -> Load:
    names, way_out = ("true_experts_per_token", "all_null_share"), "give the metrics.jsonl of a run"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as problem:
        raise UserError(f"--measured {path}: cannot be read ({problem}); {way_out}") from None
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError as problem:
            if number == len(lines):  # half written by a run that goes on, or was killed
                continue
            raise UserError(f"--measured {path}: line {number} is no JSON ({problem}); {way_out}") from None
        if not isinstance(record, dict):
            raise UserError(f"--measured {path}: line {number} is no record of a step; {way_out}")
        values = [record.get(name) for name in names]
        if all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            steps.append(values)
    if not steps:
        raise UserError(f"--measured {path}: holds no step with {' and '.join(names)}; {way_out}")
    late = steps[len(steps) // 2 :]
    return Load(**{name: sum(column) / len(late) for name, column in zip(names, zip(*late, strict=True), strict=True)})


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
    """What is asked: a configuration, where, and under which assumptions."""

    config: Config
    cluster: Cluster
    assumptions: Assumptions
    vocab_size: int
    load: Load
    space: Space

    def plan(self) -> Plan:
        return make_plan(self.config, self.cluster, self.assumptions, self.vocab_size, self.load)

    def search(self) -> Found:
        with progress(count_layouts(self.config, self.cluster, self.space), "layouts", "planning") as bar:
            return search(
                self.config, self.cluster, self.assumptions, self.vocab_size, self.load, self.space, bar.update
            )

    def sweep(self) -> list[Point]:
        with progress(None, "models", "planning") as bar:
            points = sweep(
                self.config,
                self.cluster,
                self.assumptions,
                self.vocab_size,
                self.load,
                bar.update,
                held=self.space.held,
            )
            return list(points)


def _question(options: argparse.Namespace) -> _Question:
    # argparse gives --assume all that follows it; only overrides have a dot in their name.
    overrides = [*options.overrides, *(pair for pair in options.assume if "." in pair.partition("=")[0])]
    assumed = [pair for pair in options.assume if pair not in overrides]
    config, cluster = load_config(options.config, overrides), _cluster(options)
    return _Question(
        config=config,
        cluster=cluster,
        assumptions=read_assumptions(Assumptions.of(cluster.device), options.assumptions, assumed),
        vocab_size=_vocab_size(options, config),
        load=_load(options, config),
        space=Space.holding(config, overridden_keys(overrides)),
    )


def _say(question: _Question, plan: Plan | None, found: Found | None, points: list[Point], most: int) -> None:
    precision = planned_precision(question.config, question.cluster)
    tables = search_table(found, most) if found else []
    tables += sweep_table(points) if points else []
    if plan is not None:
        tables += [*plan_lines(plan), *([] if found else stage_table(plan))]
    assumptions = assumption_lines(question.cluster, question.assumptions, precision)
    for line in [*tables, "assumptions:", *("  " + line for line in assumptions)]:
        say(line)


def _as_json(plan: Plan | None, found: Found | None, points: list[Point], most: int) -> dict[str, Any]:
    answer = as_json(plan) if plan else {}
    if found is not None:
        answer["search"] = [as_json(fitting) for fitting in found.fitting[:most]]
        answer["search_held"] = sorted(found.space.held)
    elif plan is not None:
        answer["memory_by_stage"] = stages_as_json(plan)
    if points:
        answer["sweep"] = [{"model": p.model, "plan": p.plan and as_json(p.plan)} for p in points]
    return answer


def main(argv: list[str]) -> None:
    """Plan as the command line says."""
    options = _parser().parse_intermixed_args(argv)
    question, outputs = _question(options), _outputs(options)
    found = question.search() if options.search else None
    plan = found.best() if found else None if options.sweep else question.plan()
    points = question.sweep() if options.sweep else []
    if options.json:
        say(json.dumps(_as_json(plan, found, points, options.top)))
    else:
        _say(question, plan, found, points, options.top)
    if plan is None:
        return
    if not plan.fits:
        raise UserError(shortage(plan))
    texts = {"--write-config": config_text(plan)}
    if options.write_slurm:
        texts["--write-slurm"] = slurm_text(plan, options.write_config, ROOT / "launch" / "slurm.sbatch")
    write_files((option, path, os.fsencode(texts[option])) for option, path in outputs.items())


if __name__ == "__main__":
    run_tool(main)
