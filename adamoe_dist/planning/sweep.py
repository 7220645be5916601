"""A configuration from one machine to thousands: null experts against top-k at the same load, on paper."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adamoe_dist.config import BalanceConfig, Config, DispatcherConfig
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.plan import Load, Plan
from adamoe_dist.planning.search import search
from adamoe_dist.planning.space import Space

MOST_RANKS = 10_000
FIXED = frozenset({"parallel.context", "parallel.expert_tensor", "zero.stage", "zero.offload_optimizer"})
"""Keys that a sweep leaves as they are."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The best plan of one model on one cluster; none fits where ``plan`` is None."""

    model: str
    cluster: Cluster
    plan: Plan | None


def baseline(config: Config, top_k: int) -> Config:
    """Return the configuration with Megatron's own router and dispatcher over the same experts, ``top_k`` a token."""
    router: Any = type(config.moe.router)(type="topk", balance=BalanceConfig(type="switch", coefficient=0.01))
    nulls: Any = type(config.moe.null_types)()
    moe = dataclasses.replace(
        config.moe,
        num_null_experts=0,
        top_k=top_k,
        router=router,
        null_types=nulls,
        dispatcher=DispatcherConfig(overlap_shared_expert=config.moe.dispatcher.overlap_shared_expert),
    )
    return dataclasses.replace(config, moe=moe)


def equal_load(config: Config, load: Load) -> int:
    """Return the top-k whose load is nearest to a load."""
    return min(max(1, int(load.true_experts_per_token + 0.5)), config.moe.num_experts)


def nodes_of(cluster: Cluster) -> list[int]:
    """Return the numbers of machines: doubled from one on, and last as many as have ten thousand ranks."""
    most = max(1, MOST_RANKS // cluster.gpus_per_node)
    counts = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*counts, most]


def sweep(
    config: Config,
    cluster: Cluster,
    assumptions: Assumptions,
    vocab_size: int,
    load: Load,
    advance: Callable[[int], Any] = lambda count: None,
    counts: Sequence[int] = (),
    held: frozenset[str] = frozenset(),
) -> Iterator[Point]:
    """Yield the best plan of each model on each number of machines.

    The batch grows with the ranks (as many samples a rank as the configuration has on ``cluster``, at least one). The
    models are AdaMoE at its load, at the whole load nearest to it, and Megatron's top-k at that load.

    Args:
        config: the tree; its tensor, pipeline and expert degrees, recomputation and micro-batch are replaced if they
            are not held.
        cluster: the machines; their number only says how many samples a rank has.
        assumptions: what is taken for granted.
        vocab_size: ids of the tokenizer.
        load: of a token.
        advance: told after each model how many are done since the last call.
        counts: numbers of machines; none: :func:`nodes_of`.
        held: keys that stay as they are, besides those of :data:`FIXED`.
    """
    top_k = equal_load(config, load)
    samples = max(1, config.train.global_batch_size // cluster.world_size)
    at_load = Load(true_experts_per_token=float(top_k))
    models = [(f"AdaMoE, load {load.true_experts_per_token:g}", config, load)]
    slots, nulls = config.moe.top_k, config.moe.num_null_experts
    is_possible = max(0, slots - nulls) <= top_k <= min(slots, config.moe.num_experts)
    if load.true_experts_per_token != top_k and is_possible:
        models.append((f"AdaMoE, load {top_k}", config, at_load))
    models.append((f"Megatron top-{top_k}", baseline(config, top_k), at_load))
    space = Space(held=held | FIXED, micro_batches=(1, 2, 4))
    for nodes in counts or nodes_of(cluster):
        machines = dataclasses.replace(cluster, nodes=nodes)
        for name, model, of_token in models:
            batch: Any = {"global_batch_size": samples * machines.world_size}
            grown = dataclasses.replace(model, train=dataclasses.replace(model.train, **batch))
            found = search(grown, machines, assumptions, vocab_size, of_token, space)
            advance(1)
            yield Point(model=name, cluster=machines, plan=found.fitting[0] if found.fitting else None)
