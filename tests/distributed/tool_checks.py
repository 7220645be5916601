"""What ranks do in the tests of the checkpoint tool and of damaged and hostile checkpoints."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.distributed.cases import Outcome, gathered
from tests.distributed.checkpoint_checks import Layout, started


def loads(layout: Layout, paths: list[Path]) -> list[dict[str, str | None]]:
    """Load each checkpoint, whole and as weights alone; the refusals' messages."""
    from adamoe_dist.checkpoint import load_checkpoint, load_weights
    from adamoe_dist.errors import UserError

    outcomes: list[dict[str, str | None]] = []
    with started(layout, seed=99) as run:
        for path in paths:
            outcome: dict[str, str | None] = {}
            for load in (load_checkpoint, load_weights):
                try:
                    load(path, run.engine)
                    outcome[load.__name__] = None
                except UserError as problem:
                    outcome[load.__name__] = str(problem)
            outcomes.append(outcome)
    return outcomes


def save_with_umask(layout: Layout, root: Path, umask: int) -> None:
    """Save twice, keeping one, under a umask."""
    before = os.umask(umask)
    try:
        with started(layout) as run:
            run.advance(range(1))
            run.save(root, 1, keep_last=1)
            run.save(root, 2, keep_last=1)
    finally:
        os.umask(before)


@dataclass(frozen=True)
class Resumed:
    """What was loaded (whole tensors by name) and what training on from there gave."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    optimizer_step: int
    outcome: Outcome


def resume(layout: Layout, path: Path, more: int) -> Resumed:
    """Load into an engine of other initial weights, look at what it holds, and train on."""
    from adamoe_dist.checkpoint import load_checkpoint
    from adamoe_dist.checkpoint.zero import ZeroState

    with started(layout, seed=99) as run:
        step = load_checkpoint(path, run.engine)["step"]
        zero, model = ZeroState(run.engine), run.engine.model
        canonical = {id(parameter): name for name, parameter in zero.parameters.items()}
        named = {name: canonical[id(parameter)] for name, parameter in model.named_parameters()}
        weights = gathered(model, {local: zero.weight(name).detach() for local, name in named.items()})
        moments = gathered(model, {local: zero.moment(name, "exp_avg") for local, name in named.items()})
        return Resumed(weights, moments, zero.step, run.advance(range(step, step + more)))
