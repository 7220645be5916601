"""The metrics of a logged step, reduced over all ranks so that they do not depend on how the run is cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from adamoe_dist import platform
from adamoe_dist.routing import RoutingStatistics, read_vector
from adamoe_dist.training.callback import StepResult
from adamoe_dist.training.loop import Trainer

Record = dict[str, float | int]


@dataclass(frozen=True, kw_only=True)
class RoutingRecord:
    """Routing of one MoE layer, or of several together, in one step, over all ranks.

    Attributes:
        expert_max_over_mean: of the tokens of the true experts; 1 is an even load.
        expert_load_entropy: of the distribution of tokens over the true experts, nats; ln n is an even load.
        score_entropy: of the router's softmax over true and null experts, mean over tokens, nats.
        rows: hidden vectors of the forward dispatch by distance: same_rank, same_node, other_node.
        sent_bytes: of them, their weights and the routing bits, by distance: same_node, other_node.
        tokens_by_load: tokens that chose 0, 1, ..., top_k true experts.
        tokens_by_expert: tokens that chose each true expert.
        expert_bias_min: of the selection bias, where one holds the load, as it is after the step.
        expert_bias_max: the same.
    """

    true_experts_per_token: float
    null_share: float
    all_null_share: float
    expert_max_over_mean: float
    expert_load_entropy: float
    score_entropy: float
    rows: dict[str, float]
    sent_bytes: dict[str, float]
    tokens_by_load: tuple[int, ...]
    tokens_by_expert: tuple[int, ...]
    expert_bias_min: float | None = None
    expert_bias_max: float | None = None


def layer_vectors(trainer: Trainer) -> torch.Tensor:
    """Return each MoE layer's counters summed over all ranks: (layers of all stages, sums), fp64 on CPU. Collective."""
    vectors = torch.stack([layer.counters.vector(trainer.device) for layer in trainer.model.moe_layers])
    return over_stages(trainer, vectors).cpu()


def over_stages(trainer: Trainer, mine: torch.Tensor) -> torch.Tensor:
    """Return rows of all MoE layers, summed over ranks, from those (layers of this stage, n) of each. Collective."""
    everyone = mine.new_zeros(trainer.num_moe_layers, mine.shape[1])
    first = trainer.first_moe_layer
    everyone[first : first + len(mine)] = mine
    dist.all_reduce(everyone)
    return everyone


def expert_biases(trainer: Trainer) -> list[list[float]]:
    """Return the smallest and the largest selection bias of each MoE layer. Collective."""
    biases = [layer.router.expert_bias for layer in trainer.model.moe_layers]
    mine = torch.stack([torch.stack([bias_E.min(), bias_E.max()]) for bias_E in biases]).double()
    total: list[list[float]] = (over_stages(trainer, mine) / trainer.resolved.layout.stage_ranks).tolist()
    return total


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest peak memory of any rank, in GiB. Collective."""
    peak = torch.tensor(platform.peak_memory_gib(), dtype=torch.float64, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return float(peak)


def step_record(trainer: Trainer, steps: Sequence[StepResult]) -> tuple[Record, dict[int, RoutingRecord]]:
    """Build the metrics of the last of some steps, and of each MoE layer in it by its number from 0. Collective.

    ``balance_loss`` and ``z_loss`` are means over layers and micro-batches, coefficients included: the balance loss is
    top_k x alpha at perfect balance. ``dispatch_rows`` and ``dispatch_bytes`` are sums over the step: all layers,
    micro-batches and ranks, forward only, to other ranks only; ``dispatch_rows_same_rank`` counts the rows that stayed,
    and ``dispatch_rows_same_node`` and ``dispatch_rows_other_node`` add up to ``dispatch_rows``; bytes likewise.
    ``score_entropy`` is the mean over layers and real tokens.
    ``true_experts_per_token`` counts what was selected; ``dropped_share`` of it exceeded an expert's capacity and was
    not computed, which ``expert_flops_saved`` counts too. ``true_experts_per_token_min``, ``_max`` and
    ``expert_max_over_mean`` are those of the layer with the least, the greatest, and the most uneven load.
    ``target_load_error``, there where a target is held, is the largest over layers of ``|load / target - 1|`` in this
    one step. ``loss_scale`` and ``skipped_steps``, of this process so far, are there under fp16; ``grad_norm`` of a
    skipped step is 0. ``loss_tokens``, where not every token counts, are those that ``lm_loss`` is the mean over; the
    routers' losses are then means weighted by real tokens. ``bad_steps`` and ``loss_spikes``, of this process so far,
    are there once there is one.

    Args:
        trainer: the loop.
        steps: those since the last logged one, over which time and speed are averaged.
    """
    result, seconds = steps[-1], sum(step.seconds for step in steps)
    num_experts = trainer.config.moe.num_experts
    vectors = layer_vectors(trainer)
    sums, routing = read_vector(vectors.sum(dim=0), num_experts)
    top_k = trainer.config.moe.top_k
    micro_batches = max(sums["micro_batches"] / trainer.resolved.layout.tensor, 1.0)  # each rank adds a part
    overall = routing_record(sums, routing, top_k)
    dropped_share = sums["dropped_pairs"] / max(int(routing.true_slots), 1)
    record: Record = {
        "step": result.step,
        "tokens_seen": trainer.tokens_seen,
        "lm_loss": result.lm_loss,
        "balance_loss": sums["balance_loss"] / micro_batches,
        "z_loss": sums["z_loss"] / micro_batches,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "step_time_s": seconds / len(steps),
        "tokens_per_second": sum(step.tokens.real for step in steps) / seconds,
        "true_experts_per_token": overall.true_experts_per_token,
        "null_share": overall.null_share,
        "all_null_share": overall.all_null_share,
        "score_entropy": overall.score_entropy,
        "dispatch_rows": round(sums["dispatch_rows"]),
        "dispatch_rows_same_rank": round(sums["dispatch_rows_same_rank"]),
        "dispatch_rows_same_node": round(sums["dispatch_rows_same_node"]),
        "dispatch_rows_other_node": round(sums["dispatch_rows_other_node"]),
        "dispatch_bytes": round(sums["dispatch_bytes"]),
        "dispatch_bytes_same_node": round(sums["dispatch_bytes_same_node"]),
        "dispatch_bytes_other_node": round(sums["dispatch_bytes_other_node"]),
        "dispatch_rows_undeduplicated": round(sums["dispatch_rows_undeduplicated"]),
        "dropped_share": dropped_share,
        "expert_flops_saved": 1.0
        - overall.true_experts_per_token * (1.0 - dropped_share) / trainer.config.reference_top_k,
        "memory_peak_gib": peak_memory_gib(trainer.device),
    }
    layers = [routing_record(*read_vector(vector, num_experts), top_k) for vector in vectors]
    loads = [layer.true_experts_per_token for layer in layers]
    record["true_experts_per_token_min"], record["true_experts_per_token_max"] = min(loads), max(loads)
    record["expert_max_over_mean"] = max(layer.expert_max_over_mean for layer in layers)
    target = trainer.config.moe.router.target_load
    if target is not None:
        record["target_load_error"] = max(abs(layer.true_experts_per_token / target - 1.0) for layer in layers)
        layers = [
            replace(layer, expert_bias_min=low, expert_bias_max=high)
            for layer, (low, high) in zip(layers, expert_biases(trainer), strict=True)
        ]
    if trainer.engine.is_scaled:
        record["loss_scale"] = trainer.engine.loss_scale
        record["skipped_steps"] = trainer.engine.skipped_steps
    if result.tokens.with_loss != trainer.resolved.tokens_per_step:
        record["loss_tokens"] = result.tokens.with_loss
    record.update({name: count for name, count in trainer.events.items() if count})
    return record, dict(zip(trainer.config.moe_layers, layers, strict=True))


def routing_record(sums: dict[str, float], routing: RoutingStatistics, top_k: int) -> RoutingRecord:
    """Turn the counts of a layer, or of several added up, into what is shown of them.

    Args:
        sums: as :func:`read_vector` returns them.
        routing: the same.
        top_k: slots of a token.
    """
    tokens = max(int(routing.real_tokens), 1)
    true_slots, tokens_by_expert = int(routing.true_slots), routing.expert_counts_E.tolist()
    return RoutingRecord(
        true_experts_per_token=true_slots / tokens,
        null_share=int(routing.null_slots) / (tokens * top_k),
        all_null_share=int(routing.all_null_tokens) / tokens,
        expert_max_over_mean=max(tokens_by_expert) * len(tokens_by_expert) / max(true_slots, 1),
        expert_load_entropy=entropy(tokens_by_expert),
        score_entropy=sums["score_entropy"] / tokens,
        rows={distance: sums[f"dispatch_rows_{distance}"] for distance in ("same_rank", "same_node", "other_node")},
        sent_bytes={distance: sums[f"dispatch_bytes_{distance}"] for distance in ("same_node", "other_node")},
        tokens_by_load=tuple(routing.tokens_by_load_L.tolist()),
        tokens_by_expert=tuple(tokens_by_expert),
    )


def entropy(counts: list[int]) -> float:
    """Return the entropy, in nats, of the distribution that counts are proportional to; 0 where all are 0."""
    total = max(sum(counts), 1)
    return -math.fsum(count / total * math.log(count / total) for count in counts if count)
