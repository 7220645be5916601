"""All layouts of a configuration on a cluster, the fitting ones ranked by predicted tokens a second."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from adamoe_dist.config import Config, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.plan import Load, Plan, make_plan
from adamoe_dist.planning.space import EVERYTHING, RECOMPUTE, Space, allowed_stages, layouts


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search gave: plans that fit, best first; the smallest that does not; how many were refused, and why."""

    fitting: list[Plan]
    smallest: Plan | None
    planned: int
    refused: Counter[str]
    space: Space

    def best(self) -> Plan:
        """Return the fastest plan that fits.

        Raises:
            UserError: none fits, or every layout is refused; with what is short by how much.
        """
        if self.fitting:
            return self.fitting[0]
        if self.smallest is None:
            of_held = Counter({r: n for r, n in self.refused.items() if any(key in r for key in self.space.held)})
            reason, count = (of_held or self.refused).most_common(1)[0]
            raise UserError(f"no layout is valid; {count} of {self.refused.total()} were refused like this: {reason}")
        held = f"do not hold {', '.join(sorted(self.space.held))}, " if self.space.held else ""
        raise UserError(
            shortage(self.smallest, "of all layouts the smallest", f"{held}give more nodes or a smaller model")
        )


_WAY_OUT = (
    "let --search find a layout, set zero.stage, parallel.*, train.recompute=full or zero.offload_optimizer=true, or "
    "give more nodes or a smaller model"
)


def shortage(plan: Plan, which: str = "this layout", way_out: str = _WAY_OUT) -> str:
    """Say by how much a plan does not fit, what takes most, and what to do."""
    cluster = plan.cluster
    largest = sorted(plan.memory.parts().items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
    return (
        f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node} --gpu {cluster.device.name}: {which} "
        f"({layout_words(plan)}) needs {plan.memory_gib:.1f} GiB a rank of {plan.memory_limit_gib:.1f} GiB, "
        f"{plan.memory_gib - plan.memory_limit_gib:.1f} GiB too much ({parts} GiB); {way_out}"
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
    words.append(zero_words(config))
    words.append(f"recompute {config.train.recompute}")
    words.append(f"{resolved_batch(plan)} a micro-batch")
    return ", ".join(words)


def zero_words(config: Config) -> str:
    """Return ZeRO's stage, with the warning that stage 3 needs, and where the optimizer is."""
    stage, is_offloaded = config.zero.stage, config.zero.offload_optimizer
    return f"ZeRO-{stage}" + (" (experimental)" if stage == 3 else "") + (" offloaded" if is_offloaded else "")


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
    space: Space = EVERYTHING,
    advance: Callable[[int], Any] = lambda count: None,
) -> Found:
    """Plan every layout that the configuration allows on the cluster.

    A layout is tried with each micro-batch; with ZeRO stage 0, and from stage 1 on until one fits without
    recomputation, in each of them with more recomputation until it fits (more of either only costs time), and offloaded
    where nothing else fits.

    Args:
        config: the tree; its degrees, ZeRO stage, recomputation and micro-batch are replaced if they are not held.
        cluster: what it runs on.
        assumptions: what is taken for granted.
        vocab_size: ids of the tokenizer.
        load: of a token.
        space: what is held, and the micro-batches.
        advance: told after each layout how many are done since the last call.
    """
    fitting: list[Plan] = []
    smallest: Plan | None = None
    refused: Counter[str] = Counter()
    planned = 0
    micro_batches = space.micro_batches
    if "train.micro_batch_size" in space.held:
        micro_batches = (int(config.train.micro_batch_size),)
    for candidate in layouts(config, cluster, space):
        advance(1)
        try:
            stages = allowed_stages(candidate, cluster, space, micro_batches[0])
        except UserError as refusal:
            refused[_problem(str(refusal), space)] += 1
            continue
        share = config.train.global_batch_size // resolve(stages[0], cluster.world_size).layout.data
        for micro in micro_batches:
            if share % micro:
                break
            for plan in _by_memory(stages, cluster, assumptions, vocab_size, load, micro, space):
                planned += 1
                if plan.fits:
                    fitting.append(plan)
                elif smallest is None or plan.memory_gib < smallest.memory_gib:
                    smallest = plan
    fitting.sort(key=lambda plan: (-plan.tokens_per_second, plan.memory_gib))
    return Found(fitting=fitting, smallest=smallest, planned=planned, refused=refused, space=space)


def _problem(refusal: str, space: Space) -> str:
    """Return the first problem of a refusal that names a held key, or the first, without the way out."""
    problems = [part.partition("; ")[0] for part in re.split(r"(?:^\d+ problems: |; )\(\d+\) ", refusal) if part]
    return next((problem for problem in problems if any(key in problem for key in space.held)), problems[0])


def count_layouts(config: Config, cluster: Cluster, space: Space) -> int:
    """Return how many layouts :func:`search` goes through."""
    return sum(1 for _ in layouts(config, cluster, space))


def _by_memory(
    stages: list[Config],
    cluster: Cluster,
    assumptions: Assumptions,
    vocab_size: int,
    load: Load | None,
    micro: int,
    space: Space,
) -> Iterator[Plan]:
    """Plan with ever less memory, until nothing is to be won by less."""
    has_fitted = False
    for config in stages:
        zero, own = config.zero, config.train.recompute
        if zero.offload_optimizer and has_fitted and "zero.offload_optimizer" not in space.held:
            return
        for recompute in (own,) if "train.recompute" in space.held else RECOMPUTE:
            train: Any = {"micro_batch_size": micro, "recompute": recompute}
            changed = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
            plan = make_plan(changed, cluster, assumptions, vocab_size, load)
            yield plan
            if plan.fits:
                has_fitted = True
                if recompute == "none" and zero.stage:
                    return
                break
