"""All layouts of a configuration on a cluster, the fitting ones ranked by predicted tokens a second."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from adamoe_dist.config import Config, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.plan import Load, Plan, make_plan

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_MOST_STAGES = 32
_MOST_CONTEXT = 8
_RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gave: plans that fit, best first; the smallest that does not; how many were refused, and why."""

    fitting: list[Plan]
    smallest: Plan | None
    planned: int
    refused: Counter[str]

    def best(self) -> Plan:
        """Return the fastest plan that fits.

        Raises:
            UserError: none fits, or every layout is refused; with what is short by how much.
        """
        if self.fitting:
            return self.fitting[0]
        if self.smallest is None:
            reason, count = self.refused.most_common(1)[0] if self.refused else ("no layout was found", 0)
            raise UserError(f"no layout is valid; {count} of {self.refused.total()} were refused like this: {reason}")
        raise UserError(shortage(self.smallest, "of all layouts the smallest"))


def shortage(plan: Plan, which: str = "this layout") -> str:
    """Say by how much a plan does not fit, and what takes most."""
    cluster = plan.cluster
    largest = sorted(plan.memory.parts().items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
    return (
        f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node} --gpu {cluster.device.name}: {which} "
        f"({layout_words(plan)}) needs {plan.memory_gib:.1f} GiB a rank of {plan.memory_limit_gib:.1f} GiB, "
        f"{plan.memory_gib - plan.memory_limit_gib:.1f} GiB too much ({parts} GiB); give more nodes, "
        "zero.offload_optimizer=true, train.recompute=full, or a smaller model"
    )


def layout_words(plan: Plan) -> str:
    """Return a layout in a few words: degrees that are not 1, ZeRO, recompute, micro-batch."""
    layout, config = plan.resolved.layout, plan.config
    degrees = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.data,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
    }
    words = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    words.append(f"ZeRO-{config.zero.stage}" + (" offloaded" if config.zero.offload_optimizer else ""))
    words.append(f"recompute {config.train.recompute}")
    words.append(f"{resolved_batch(plan)} a micro-batch")
    return ", ".join(words)


def resolved_batch(plan: Plan) -> str:
    """Return the micro-batch's size in samples."""
    size = plan.resolved.micro_batch_size
    return f"{size} sample{'s' if size > 1 else ''}"


def search(
    config: Config,
    cluster: Cluster,
    assumptions: Assumptions,
    vocab_size: int,
    load: Load | None = None,
    narrow: bool = False,
    advance: Callable[[int], Any] = lambda count: None,
) -> Found:
    """Plan every layout that the configuration allows on the cluster.

    A layout is tried with each micro-batch; with each ZeRO stage until one fits without recomputation, in each of them
    with more recomputation until it fits (more of either only costs time), and offloaded where nothing else fits.

    Args:
        config: the tree; its degrees, ZeRO stage, recomputation and micro-batch are replaced.
        cluster: what it runs on.
        assumptions: what is taken for granted.
        vocab_size: ids of the tokenizer.
        load: of a token.
        narrow: leave context and expert-tensor degrees and the ZeRO stage as they are, and try small micro-batches.
        advance: told after each layout how many are done since the last call.
    """
    fitting: list[Plan] = []
    smallest: Plan | None = None
    refused: Counter[str] = Counter()
    planned = 0
    for candidate in _layouts(config, cluster, narrow):
        advance(1)
        try:
            resolved = resolve(_with(candidate, micro=1, stage=1), cluster.world_size)
        except UserError as refusal:
            refused[_first_problem(str(refusal))] += 1
            continue
        share = config.train.global_batch_size // resolved.layout.data
        for micro in _MICRO_BATCHES[: 3 if narrow else None]:
            if share % micro:
                break
            stages = ((config.zero.stage, config.zero.offload_optimizer),) if narrow else _stages(candidate)
            for plan in _by_memory(candidate, cluster, assumptions, vocab_size, load, micro, stages):
                planned += 1
                if plan.fits:
                    fitting.append(plan)
                elif smallest is None or plan.memory_gib < smallest.memory_gib:
                    smallest = plan
    fitting.sort(key=lambda plan: (-plan.tokens_per_second, plan.memory_gib))
    return Found(fitting=fitting, smallest=smallest, planned=planned, refused=refused)


def _first_problem(refusal: str) -> str:
    """Return the first problem of a refusal, without the way out."""
    return refusal.partition("(1) ")[2].partition("; ")[0] or refusal.partition("; ")[0]


def count_layouts(config: Config, cluster: Cluster) -> int:
    """Return how many layouts :func:`search` goes through."""
    return sum(1 for _ in _layouts(config, cluster, False))


def _stages(config: Config) -> tuple[tuple[int, bool], ...]:
    whole = ((1, False), (2, False))
    return (*whole, (3, False), (2, True)) if config.parallel.pipeline == 1 else (*whole, (2, True))


def _by_memory(
    config: Config,
    cluster: Cluster,
    assumptions: Assumptions,
    vocab_size: int,
    load: Load | None,
    micro: int,
    stages: tuple[tuple[int, bool], ...],
) -> Iterator[Plan]:
    """Plan with ever less memory, until nothing is to be won by less."""
    has_fitted = False
    for stage, is_offloaded in stages:
        if is_offloaded and has_fitted and len(stages) > 1:
            return
        for recompute in _RECOMPUTE:
            changed = _with(config, micro=micro, stage=stage, offload=is_offloaded, recompute=recompute)
            plan = make_plan(changed, cluster, assumptions, vocab_size, load)
            yield plan
            if plan.fits:
                has_fitted = True
                if recompute == "none":
                    return
                break


def _with(config: Config, *, micro: int, stage: int, offload: bool = False, recompute: str = "none") -> Config:
    zero: Any = {"stage": stage, "offload_optimizer": offload}
    optimizer = config.optimizer
    if not offload and optimizer.implementation == "deepspeed_cpu":
        optimizer = dataclasses.replace(optimizer, implementation="auto")
    train: Any = {"micro_batch_size": micro, "recompute": recompute}
    return dataclasses.replace(
        config,
        zero=dataclasses.replace(config.zero, **zero),
        train=dataclasses.replace(config.train, **train),
        optimizer=optimizer,
    )


def _layouts(config: Config, cluster: Cluster, narrow: bool) -> Iterator[Config]:
    """Yield the configuration with every set of degrees that divides the ranks."""
    world, parallel = cluster.world_size, config.parallel
    contexts = [parallel.context] if narrow else _divisors(world, _MOST_CONTEXT)
    for tensor in _divisors(world, cluster.gpus_per_node):
        for pipeline in _divisors(world, min(config.model.num_layers, _MOST_STAGES)):
            for context in contexts:
                if world % (tensor * pipeline * context):
                    continue
                cuts = [parallel.expert_tensor] if narrow else sorted({1, tensor})
                for cut in cuts:
                    for expert in _divisors(config.moe.num_experts, world // (pipeline * cut)):
                        degrees: Any = {
                            "tensor": tensor,
                            "pipeline": pipeline,
                            "context": context,
                            "expert": expert,
                            "expert_tensor": cut,
                        }
                        yield dataclasses.replace(config, parallel=dataclasses.replace(parallel, **degrees))


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
