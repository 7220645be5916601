"""Section ``monitor``: what is reported."""

from dataclasses import dataclass

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class MonitorConfig:
    """Metrics and logs."""

    log_interval: int = key(10, "Steps between two lines of metrics.", at_least=1)
    tensorboard: bool = key(True, "Write TensorBoard files to <run.dir>/tensorboard.")
    sample_prompt: str = key("def ", "Text that the model continues at the end of the run.")
    sample_tokens: int = key(0, "Tokens of that sample (0: none).", at_least=0)
    spike_window: int = key(
        100, "Losses before a step, at most, whose mean and deviation tell whether its own is a spike.", at_least=2
    )
    spike_factor: float | None = key(
        6.0, "Standard deviations above that mean from which on a loss is reported as a spike; null: none is.", above=0
    )
    hang_timeout_s: float | None = key(
        600.0,
        "Seconds without progress on any rank (a forward pass, a validation batch, files that grow) after which the "
        "run is ended, with the rank that hangs named; longer than any step. null: it waits for ever.",
        at_least=1,
    )
