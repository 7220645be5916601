"""Section ``monitor``: what is reported."""

from dataclasses import dataclass

from adamoe_dist.config.fields import key, section


@dataclass(kw_only=True)
class ProfileConfig:
    """Traces of chosen steps."""

    steps: list[int] = key(
        [],
        "First and last step to profile, as [10, 12], each rank's trace to <run.dir>/profile (docs/profiling.md); "
        "[]: none.",
    )
    ranks: list[int] = key([0], "Ranks that are profiled.")
    memory: bool = key(
        True, "Record allocations too: in the trace, and on CUDA also as a memory snapshot with their stacks."
    )


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, by DeepSpeed's writer."""

    project: str | None = key(None, "Project that the run's scalars are sent to; needs the package wandb. null: off.")
    group: str | None = key(None, "Group that the run belongs to in that project.")
    team: str | None = key(None, "Account or team whose project it is; null: the default of whoever is logged in.")


@dataclass(kw_only=True)
class MonitorConfig:
    """Metrics and logs."""

    log_interval: int = key(10, "Steps between two lines of metrics.", at_least=1)
    tensorboard: bool = key(True, "Write TensorBoard files to <run.dir>/tensorboard.")
    image_interval: int | None = key(
        100,
        "Steps between two sets of heat maps and histograms in TensorBoard and of the counts in routing.jsonl, each at "
        "the first line of metrics that is due; also at the first and last. null: no pictures, counts at the last.",
        at_least=1,
    )
    csv: bool = key(False, "Write the same scalars to <run.dir>/csv, a file each.")
    wandb: WandbConfig = section(WandbConfig, "Weights & Biases.")
    sample_prompt: str = key("def ", "Text that the model continues at the end of the run.")
    sample_tokens: int = key(0, "Tokens of that sample (0: none).", at_least=0)
    sample_interval: int | None = key(
        None, "Steps between two samples, in the log and in TensorBoard; null: only at the end.", at_least=1
    )
    spike_window: int = key(
        100, "Losses before a step, at most, whose mean and deviation tell whether its own is a spike.", at_least=2
    )
    spike_factor: float | None = key(
        6.0, "Standard deviations above that mean from which on a loss is reported as a spike; null: none is.", above=0
    )
    peak_tflops: float | None = key(
        None,
        "Peak of a rank's device in TFLOP/s, in the precision of the run, that mfu is measured against; null: that of "
        "the data sheet for GPUs that the planner knows, and no mfu for others.",
        above=0,
    )
    profile: ProfileConfig = section(ProfileConfig, "Traces of chosen steps.")
    hang_timeout_s: float | None = key(
        600.0,
        "Seconds without progress on any rank (a forward pass, a validation batch, files that grow) after which the "
        "run is ended, with the rank that hangs named; longer than any step. null: it waits for ever.",
        at_least=1,
    )
