"""What a run will hold and compute, from its configuration alone."""

from adamoe_dist.config import Config, Resolved
from adamoe_dist.planning.activations import tokens_of_a_rank
from adamoe_dist.planning.compute import flops_per_token
from adamoe_dist.planning.memory import peak_memory, rank_memory
from adamoe_dist.planning.parameters import count_parameters, expected_load
from adamoe_dist.planning.placement import place
from adamoe_dist.planning.rows import dispatch_rows
from adamoe_dist.planning.spread import load_distribution

_UNITS = ("bytes", "KiB", "MiB", "GiB")


def describe_run(
    config: Config, resolved: Resolved, padded_vocab_size: int, precision: str, is_cpu: bool = True
) -> list[str]:
    """Return the arithmetic of a run, one fact a line, as ``--dry-run`` and the start-up report show it.

    Memory, rows and operations are those of :func:`adamoe_dist.planning.make_plan`; which machine a rank is on is not
    asked for, so rows are not told by distance.
    """
    parameters, load = count_parameters(config, padded_vocab_size), expected_load(config)
    memory = rank_memory(config, resolved, parameters, precision)
    layout, slots = resolved.layout, config.moe
    spread = load_distribution(slots.num_experts, slots.num_null_experts, slots.top_k, load)
    groups, tokens = place(layout, layout.world_size), tokens_of_a_rank(config, resolved)
    rows = dispatch_rows(config, layout, groups, tokens, spread, precision)
    kept_rows = (rows.rows + rows.same_rank) * rows.row_bytes
    peak = peak_memory(config, resolved, parameters, padded_vocab_size, precision, load, kept_rows, is_cpu)
    dispatches = parameters.moe_layers * resolved.micro_batches_per_rank * layout.stage_ranks
    train, moe = config.train, config.moe
    load_is = "at balance" if moe.router.target_load is None else "held (moe.router.target_load)"
    of_stage = " of the fullest stage" if resolved.layout.pipeline > 1 else ""
    return [
        f"ranks: {resolved.layout.explain()}; ZeRO stage {config.zero.stage}, {precision}",
        f"batch: {train.global_batch_size} samples = {resolved.micro_batch_size} a micro-batch x "
        f"{resolved.micro_batches_per_rank} accumulated x {resolved.data_parallel} data-parallel ranks; "
        f"{resolved.tokens_per_step} tokens a step, {resolved.tokens_per_step * train.steps} in {train.steps} steps",
        f"experts: {moe.num_experts} true + {moe.num_null_experts} null, top_k={moe.top_k}: "
        f"{load:.2f} true experts a token {load_is}, {moe.num_experts // resolved.expert_parallel} a rank, in "
        f"{parameters.moe_layers} of {config.model.num_layers} layers",
        f"parameters: {parameters.total:,} total, {parameters.active(load):,} active a token at that load "
        f"(vocabulary {padded_vocab_size})",
        f"training state a rank{of_stage}: {size_words(memory.total)} = weights {size_words(memory.weights)} + "
        f"gradients {size_words(memory.gradients)} + optimizer {size_words(memory.optimizer)}"
        + (f"; in CPU memory {size_words(memory.host)}" if memory.host else ""),
        f"at the peak of a step about {size_words(peak.total)}, activations {size_words(peak.activations)} of it "
        f"(recompute {config.train.recompute}; the driver's own memory not counted)",
        f"dispatch: about {rows.rows * dispatches:.0f} rows to other ranks a step, "
        f"{size_words(rows.bytes * dispatches)} forward (one row a token and true expert: "
        f"{rows.undeduplicated * dispatches:.0f}), at that load and experts used alike",
        f"compute: {flops_per_token(config, parameters, load) / 1e6:.2f} MFLOP a token, forward and backward",
    ]


def size_words(size: float) -> str:
    """Return a number of bytes in the unit in which it has one to four digits: ``3.21 MiB``, ``1020 GiB``."""
    for unit in _UNITS:
        if size < 1023.5:
            return f"{size:.4g} {unit}" if size >= 1000 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
