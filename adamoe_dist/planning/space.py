"""What a search over layouts tries, and what it leaves as the configuration has it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from adamoe_dist.config import Config, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.planning.hardware import Cluster

_MOST_STAGES = 32
_MOST_CONTEXT = 8
RECOMPUTE = ("none", "selective", "full")
_DEGREES = ("tensor", "pipeline", "context", "expert", "expert_tensor")
SEARCHED = (
    *(f"parallel.{degree}" for degree in _DEGREES),
    "zero.stage",
    "zero.offload_optimizer",
    "train.recompute",
    "train.micro_batch_size",
)
"""The keys that a search replaces, unless they are held."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search tries.

    Attributes:
        held: keys of :data:`SEARCHED` that stay as the configuration has them.
        micro_batches: sizes in samples.
    """

    held: frozenset[str] = frozenset()
    micro_batches: tuple[int, ...] = (1, 2, 4, 8, 16)

    @classmethod
    def holding(cls, config: Config, keys: frozenset[str]) -> "Space":
        """Hold those of ``keys`` that a search would replace; ``auto`` holds nothing."""
        values = _values(config)
        return cls(held=frozenset(key for key in SEARCHED if key in keys and values[key] != "auto"))

    def describe(self, config: Config) -> list[str]:
        """Return what is held and what is tried, a line each."""
        values = _values(config)
        held = [f"{key}={values[key]}".lower() for key in SEARCHED if key in self.held]
        sizes = ", ".join(map(str, self.micro_batches))
        tried = {
            "parallel.tensor": "tensor up to a node",
            "parallel.pipeline": f"pipeline up to {_MOST_STAGES}",
            "parallel.context": f"context up to {_MOST_CONTEXT}",
            "parallel.expert": "every expert degree",
            "parallel.expert_tensor": "expert_tensor 1 and as tensor",
            "zero.stage": "ZeRO 0 to 3 (3 without a pipeline)",
            "zero.offload_optimizer": "offloading where nothing else fits",
            "train.recompute": "recompute none, selective, full",
            "train.micro_batch_size": f"micro-batches of {sizes}",
        }
        return [
            f"held by the command line: {', '.join(held) or 'nothing (section.key=value holds a key)'}",
            f"tried: {'; '.join(words for key, words in tried.items() if key not in self.held)}",
        ]


EVERYTHING = Space()


def _values(config: Config) -> dict[str, Any]:
    """Return the values of the keys that a search replaces."""
    sections = {key: key.split(".") for key in SEARCHED}
    return {key: getattr(getattr(config, section), name) for key, (section, name) in sections.items()}


def allowed_stages(config: Config, cluster: Cluster, space: Space, micro: int) -> list[Config]:
    """Return the layout with each ZeRO stage that it allows, the offloaded optimizer last.

    Raises:
        UserError: it allows none.
    """
    zero = config.zero
    on_device = [zero.stage] if "zero.stage" in space.held else [0, 1, 2, 3]
    offloaded = [zero.stage] if "zero.stage" in space.held else [2]
    if "zero.offload_optimizer" in space.held:
        offloaded = [stage for stage in on_device if stage or len(on_device) == 1] if zero.offload_optimizer else []
        on_device = [] if zero.offload_optimizer else on_device
    found, first_refusal = [], None
    for stage, is_offloaded in [*((s, False) for s in on_device), *((s, True) for s in offloaded)]:
        changed = _with(config, micro=micro, stage=stage, offload=is_offloaded)
        try:
            resolve(changed, cluster.world_size)
            found.append(changed)
        except UserError as refusal:
            first_refusal = first_refusal or refusal
    if not found:
        assert first_refusal is not None
        raise first_refusal
    return found


def _with(config: Config, *, micro: int, stage: int, offload: bool) -> Config:
    zero: Any = {"stage": stage, "offload_optimizer": offload}
    optimizer = config.optimizer
    if not offload and optimizer.implementation == "deepspeed_cpu":
        optimizer = dataclasses.replace(optimizer, implementation="auto")
    train: Any = {"micro_batch_size": micro}
    return dataclasses.replace(
        config,
        zero=dataclasses.replace(config.zero, **zero),
        train=dataclasses.replace(config.train, **train),
        optimizer=optimizer,
    )


def layouts(config: Config, cluster: Cluster, space: Space) -> Iterator[Config]:
    """Yield the configuration with every set of degrees that divides the ranks; with the held alone if none does."""
    world, parallel = cluster.world_size, config.parallel

    def choices(degree: str, free: list[int]) -> list[int]:
        return [int(getattr(parallel, degree))] if f"parallel.{degree}" in space.held else free

    def laid_out(*degrees: int) -> Config:
        changes: Any = dict(zip(_DEGREES, degrees, strict=True))
        return dataclasses.replace(config, parallel=dataclasses.replace(parallel, **changes))

    has_any = False
    dense = (
        choices("tensor", _divisors(world, cluster.gpus_per_node)),
        choices("pipeline", _divisors(world, min(config.model.num_layers, _MOST_STAGES))),
        choices("context", _divisors(world, _MOST_CONTEXT)),
    )
    for tensor, pipeline, context in product(*dense):
        if world % (tensor * pipeline * context):
            continue
        for cut in choices("expert_tensor", sorted({1, tensor})):
            for expert in choices("expert", _divisors(config.moe.num_experts, world // (pipeline * cut))):
                has_any = True
                yield laid_out(tensor, pipeline, context, expert, cut)
    if not has_any:
        yield laid_out(*(choices(degree, [1])[0] for degree in _DEGREES))


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
