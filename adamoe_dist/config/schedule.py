"""Section ``schedule``: the learning rate over the steps."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then decay to a floor."""

    total_steps: int | None = key(
        None,
        "Length the learning rate and the annealing are laid out for; null means train.steps. Set it to stop "
        "early now and resume later on the same schedule.",
        at_least=1,
    )
    warmup_steps: int = key(0, "Steps of linear warm-up from 0.", at_least=0)
    decay: Literal["cosine", "linear", "constant"] = key("cosine", "Shape of the decay after warm-up.")
    final_fraction: float = key(0.1, "Learning rate at the end, as a part of the peak.", at_least=0)
