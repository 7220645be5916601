"""What changes from step to step: the learning rate and the balance coefficient."""

import math

from adamoe_dist.config import Config
from adamoe_dist.routing import annealed_coefficient


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0): linear warm-up, then decay to the floor."""
    peak, schedule = config.optimizer.learning_rate, config.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    span = max(config.total_steps - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / span, 1.0)
    remaining = 1.0 - progress if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * remaining)


def balance_coefficient(config: Config, step: int) -> float:
    """Return alpha of the balance loss at optimizer step ``step`` (from 0)."""
    balance = config.moe.router.balance
    if balance.type == "none":
        return 0.0
    return annealed_coefficient(
        step,
        balance.coefficient,
        balance.final_coefficient,
        balance.anneal_steps or config.total_steps,
        balance.anneal,
    )
