"""Where the time of a step went, as metrics."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from adamoe_dist.timing import LAYER_PARTS, PHASES, PIPELINE, SAVE
from adamoe_dist.training.loop import Trainer

_NAMES = (*PHASES, *LAYER_PARTS, "other", SAVE)


def phase_fields(
    trainer: Trainer, seconds: Mapping[str, float], step_seconds: float, save_seconds: float
) -> dict[str, float]:
    """Return ``time_<phase>_s``, each the mean over ranks. Collective.

    ``data``, ``forward``, ``backward``, ``pipeline`` (with several stages: the exchange with neighbours, waiting
    included), ``optimizer`` (ZeRO's reduction at the end of the step, clipping, the update) and ``other`` follow each
    other and add up to the measured step. ``routing``, ``dispatch``, ``experts`` and ``combine`` are parts of
    ``forward``; the rest of it is attention, dense and shared feed-forward layers, and the vocabulary. Their own
    gradients, and what recomputation does again, are in ``backward``. ``other`` is mostly the agreement of the ranks:
    waiting for the slowest. ``save`` lies between steps: how long training stood still for checkpoints.

    Args:
        trainer: the loop.
        seconds: of the measured step, by name.
        step_seconds: of that step.
        save_seconds: for checkpoints, a step, averaged since the last record.
    """
    mine = {**dict.fromkeys(_NAMES, 0.0), **{name: seconds[name] for name in _NAMES if name in seconds}}
    mine["other"] = step_seconds - sum(mine[name] for name in PHASES)
    mine[SAVE] = save_seconds
    total = torch.tensor([mine[name] for name in _NAMES], dtype=torch.float64, device=trainer.device)
    dist.all_reduce(total)
    means = dict(zip(_NAMES, (total / dist.get_world_size()).tolist(), strict=True))
    if trainer.resolved.layout.pipeline == 1:
        del means[PIPELINE]
    return {f"time_{name}_s": value for name, value in means.items()}
