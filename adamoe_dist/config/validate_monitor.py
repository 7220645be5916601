"""Checks of the section ``monitor`` against the length of the run and its ranks."""

from adamoe_dist.config.monitor import ProfileConfig
from adamoe_dist.config.tree import Config


def check_profile(config: Config, world_size: int, problems: list[str]) -> None:
    """Add what is wrong with ``monitor.profile`` to ``problems``."""
    settings = config.monitor.profile
    if not settings.steps:
        if settings != ProfileConfig():
            problems.append(
                f"monitor.profile.ranks={settings.ranks}, monitor.profile.memory={settings.memory} do nothing without "
                "monitor.profile.steps; set it or leave them at their defaults"
            )
        return
    if len(settings.steps) != 2 or not 1 <= settings.steps[0] <= settings.steps[1]:
        problems.append(
            f"monitor.profile.steps={settings.steps} must be [FIRST, LAST] with 1 <= FIRST <= LAST, such as [10, 12]; "
            "[10, 10] is one step"
        )
    elif config.finetune.epochs is None and (problem := profile_steps_problem(config)):
        problems.append(problem)
    unknown = [rank for rank in settings.ranks if not 0 <= rank < world_size]
    if unknown:
        problems.append(
            f"monitor.profile.ranks={settings.ranks} names rank {unknown[0]}, and the run has ranks 0 to "
            f"{world_size - 1}; take it out or start more ranks"
        )
    elif not settings.ranks or len(set(settings.ranks)) != len(settings.ranks):
        problems.append(
            f"monitor.profile.ranks={settings.ranks} must name at least one rank, each once; to profile nothing set "
            "monitor.profile.steps=[]"
        )


def profile_steps_problem(config: Config) -> str | None:
    """Say why the steps to profile never come, if they do not."""
    steps, last = config.monitor.profile.steps, config.train.steps
    if not steps or steps[-1] <= last:
        return None
    return f"monitor.profile.steps={steps} ends after the last step, train.steps={last}; name earlier steps"
