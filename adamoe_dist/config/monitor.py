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
