"""Plans in words, as tables and as JSON."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from adamoe_dist.errors import UserError
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.plan import Plan, memory_by_stage
from adamoe_dist.planning.search import Found, layout_words, resolved_batch, zero_words
from adamoe_dist.planning.step import HIDDEN
from adamoe_dist.planning.sweep import Point
from adamoe_dist.planning.traffic import dispatch_bytes_of_layer


def plan_lines(plan: Plan) -> list[str]:
    """Return a plan, a fact a line."""
    return [*_what(plan), *_memory(plan), *_rows(plan), *_time(plan)]


def assumption_lines(cluster: Cluster, assumptions: Assumptions, precision: str) -> list[str]:
    """Return all that is taken for granted, with values; any can be changed with ``--assume name=value``."""
    device = cluster.device
    return [
        f"device {device.name}: {device.peak_flops(precision) / 1e12:g} TFLOP/s in {precision}, "
        f"{device.memory_gib:g} GiB at {device.memory_gb_s:g} GB/s; a rank and direction {device.intra_node_gb_s:g} "
        f"GB/s within a node, {device.inter_node_gb_s:g} GB/s between nodes",
        "experts are used alike; given their number, a token's true experts are any; nothing is dropped",
        f"hidden behind computing: {'; '.join(HIDDEN)}",
        "every collective starts in the same time (latency_us), whatever its size and kind",
        *assumptions.lines(),
    ]


def _what(plan: Plan) -> list[str]:
    layout, load = plan.resolved.layout, plan.load.true_experts_per_token
    batches = counted(plan.resolved.micro_batches_per_rank, "micro-batch", "es")
    known = plan.load.all_null_share
    spread = "" if known is None else f", {known:.1%} of the tokens with none"
    return [
        f"cluster: {counted(plan.cluster.nodes, 'node')} x {plan.cluster.gpus_per_node} {plan.cluster.device.name}",
        f"layout: {layout.explain()}; {zero_words(plan.config)}, recompute {plan.config.train.recompute}, "
        f"{plan.precision}; {batches} of {resolved_batch(plan)}",
        f"parameters: {plan.parameters.total:,} total, {plan.parameters.active(load):,} active a token at a load of "
        f"{load:g} true experts{spread}",
        f"FLOPs a token, forward and backward: model {plan.model_flops / 1e9:.4g} G, hardware "
        f"{plan.hardware_flops / 1e9:.4g} G (with what is recomputed and padded)",
    ]


def _memory(plan: Plan) -> list[str]:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in plan.memory.parts().items())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    host = f"; in CPU memory {_gib(plan.memory.state.host)} GiB" if plan.memory.state.host else ""
    return [
        f"memory of the fullest rank, GiB: {plan.memory_gib:.3g} of {plan.memory_limit_gib:.3g}: {verdict}",
        f"  {parts}; driver, libraries and fragments {plan.assumptions.memory_overhead_gib:.3g} (of the last two the "
        f"larger counts){host}",
    ]


def _rows(plan: Plan) -> list[str]:
    rows, factor = plan.rows, plan.rows_factor
    near, far = dispatch_bytes_of_layer(rows, plan.config.train.recompute == "full")
    saved = 1 - rows.rows / rows.undeduplicated if rows.undeduplicated else 0.0
    return [
        f"rows of a layer and micro-batch, a rank: {rows.same_rank:.0f} stay, {rows.same_node:.0f} to the same node, "
        f"{rows.other_node:.0f} to other nodes",
        f"rows of a step, all ranks: {rows.same_rank * factor:.0f} stay, {rows.same_node * factor:.0f} to the same "
        f"node, {rows.other_node * factor:.0f} to other nodes; {round(saved, 3) + 0.0:.1%} fewer than one a token and "
        "true expert",
        f"bytes of a step, all ranks: {rows.bytes * factor / 1e9:.4g} GB forward dispatch; with combine and backward "
        f"{near * factor / 1e9:.4g} GB within nodes, {far * factor / 1e9:.4g} GB between nodes",
    ]


def _time(plan: Plan) -> list[str]:
    time = plan.time
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in time.parts().items() if seconds)
    return [
        f"step: {time.total:.4g} s = {parts}; {time.hidden:.3g} s more of exchanges are hidden",
        f"speed: {plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.cluster.world_size:,.0f} a "
        f"rank; MFU {plan.mfu:.1%}, HFU {plan.hfu:.1%}",
        f"bottleneck: {time.bottleneck} ({time.parts()[time.bottleneck] / time.total:.0%} of the step)",
    ]


def stage_table(plan: Plan) -> list[str]:
    """Return a rank's memory at the peak by part for each ZeRO stage of the planned layout, as a table."""
    memory, overhead = memory_by_stage(plan), plan.assumptions.memory_overhead_gib * 2**30
    rows, refused = [], []
    header: tuple[str, ...] = ("GiB a rank", "sum")
    for stage, peak in memory.items():
        mark = " (this plan)" if stage == plan.config.zero.stage else " (experimental)" if stage == 3 else ""
        if isinstance(peak, UserError):
            refused.append(f"  ZeRO-{stage} is refused: {peak}")
            continue
        parts = peak.table_parts(overhead)
        header = ("GiB a rank", *parts, "sum")
        rows.append((f"ZeRO-{stage}{mark}", *map(_gib, parts.values()), _gib(sum(parts.values()))))
    return [*table(header, rows), *refused]


def stages_as_json(plan: Plan) -> dict[str, Any]:
    """Return :func:`stage_table` as plain values: bytes, or why a stage is refused."""
    overhead = plan.assumptions.memory_overhead_gib * 2**30
    found: dict[str, Any] = {}
    for stage, peak in memory_by_stage(plan).items():
        if isinstance(peak, UserError):
            found[str(stage)] = {"refused": str(peak)}
        else:
            parts = peak.table_parts(overhead)
            found[str(stage)] = {**parts, "sum": sum(parts.values())}
    return found


def search_table(found: Found, most: int) -> list[str]:
    """Return the best plans as a table, with what bounds each."""
    header = ("", "layout", "tokens/s", "MFU", "GiB a rank", "step s", "most time", "then")
    rows = []
    for place, plan in enumerate(found.fitting[:most], 1):
        parts = sorted(plan.time.parts().items(), key=lambda part: -part[1])[:2]
        reasons = [f"{name} {seconds / plan.time.total:.0%}" for name, seconds in parts]
        numbers = (f"{plan.tokens_per_second:,.0f}", f"{plan.mfu:.1%}", f"{plan.memory_gib:.1f}")
        rows.append((str(place), layout_words(plan), *numbers, f"{plan.time.total:.3g}", *reasons))
    return [
        *table(header, rows),
        f"{found.planned} plans, {len(found.fitting)} fit in memory; {found.refused.total()} layouts refused",
        *(f"  {count} x {reason}" for reason, count in found.refused.most_common(3)),
        *found.space.describe(found.best().config),
    ]


def sweep_table(points: Iterable[Point]) -> list[str]:
    """Return one row a model and number of GPUs; speeds are compared with top-k's on as many.

    Raises:
        UserError: nothing fits on any number of GPUs.
    """
    points = list(points)
    speed = {p.cluster.world_size: p.plan.tokens_per_second for p in points if p.plan and "top-" in p.model}
    if not any(point.plan for point in points):
        raise UserError("--sweep: no model fits on any number of GPUs; --search says by how much it is too large")
    compared = ("tokens/s", "/ top-k", "MFU", "far rows a token and layer", "most time")
    header = ("GPUs", "tokens a step", "model", "layout", *compared)
    rows = []
    for point in points:
        plan, ranks = point.plan, point.cluster.world_size
        if plan is None:
            rows.append((str(ranks), "", point.model, "fits in no layout", "", "", "", "", ""))
            continue
        tokens = plan.resolved.tokens_per_step * plan.parameters.moe_layers
        rows.append(
            (
                str(ranks),
                f"{plan.resolved.tokens_per_step:,}",
                point.model,
                layout_words(plan),
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.tokens_per_second / speed[ranks]:.3f}" if ranks in speed else "",
                f"{plan.mfu:.1%}",
                f"{plan.rows.other_node * plan.rows_factor / tokens:.3f}",
                plan.time.bottleneck,
            )
        )
    return [*table(header, rows), "the batch grows with the GPUs: as many samples a rank on each number of them"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table with columns of equal width."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)) + " |" for r in lines]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values: bytes, seconds, rows."""
    rows, factor = plan.rows, plan.rows_factor
    return {
        "cluster": dataclasses.asdict(plan.cluster),
        "assumptions": dataclasses.asdict(plan.assumptions),
        "layout": dataclasses.asdict(plan.resolved.layout),
        "zero_stage": plan.config.zero.stage,
        "offload_optimizer": plan.config.zero.offload_optimizer,
        "recompute": plan.config.train.recompute,
        "precision": plan.precision,
        "micro_batch_size": plan.resolved.micro_batch_size,
        "micro_batches_per_rank": plan.resolved.micro_batches_per_rank,
        "tokens_per_step": plan.resolved.tokens_per_step,
        "true_experts_per_token": plan.load.true_experts_per_token,
        "parameters_total": plan.parameters.total,
        "parameters_active": plan.parameters.active(plan.load.true_experts_per_token),
        "model_flops_per_token": plan.model_flops,
        "hardware_flops_per_token": plan.hardware_flops,
        "memory_bytes": plan.memory.parts(),
        "memory_host_bytes": plan.memory.state.host,
        "memory_gib": plan.memory_gib,
        "memory_limit_gib": plan.memory_limit_gib,
        "fits": plan.fits,
        "dispatch_rows_same_rank": rows.same_rank * factor,
        "dispatch_rows_same_node": rows.same_node * factor,
        "dispatch_rows_other_node": rows.other_node * factor,
        "dispatch_rows_undeduplicated": rows.undeduplicated * factor,
        "dispatch_bytes": rows.bytes * factor,
        "step_seconds": plan.time.parts(),
        "step_time_s": plan.time.total,
        "hidden_seconds": plan.time.hidden,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "bottleneck": plan.time.bottleneck,
    }


def counted(number: int, what: str, plural: str = "s") -> str:
    """Return a number of things in words."""
    return f"{number} {what}{plural if number != 1 else ''}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
