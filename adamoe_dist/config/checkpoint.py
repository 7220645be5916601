"""Section ``checkpoint``: when to save and what to start from."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    interval: int | None = key(
        None, "Save every so many steps; the last step is always saved; null: only that.", at_least=1
    )
    keep_last: int | None = key(None, "Complete checkpoints kept, older ones are removed; null: all.", at_least=1)
    keep_every: int | None = key(
        None, "Checkpoints of steps that this divides are kept for good and not counted by keep_last.", at_least=1
    )
    asynchronous: bool = key(
        True,
        "Write in the background: training stands still only while the state is copied to CPU memory. false: until it "
        "is on the disk.",
    )
    on_failure: Literal["stop", "continue"] = key(
        "stop", "What a save that fails on the disk does to the run; the last complete checkpoint stays either way."
    )
    time_limit_minutes: float | None = key(
        None, "Save and leave with exit code 143 after so many minutes, for a scheduler's limit.", above=0
    )
    resume: str = key(
        "none",
        "none: start new, refused where the run directory has checkpoints; auto: continue from the last complete "
        "checkpoint, start new where there is none; or a checkpoint directory.",
    )
    allow_changes: list[str] = key(
        [],
        "Keys or sections, such as [optimizer.learning_rate, schedule], in which a resumed run may differ from its "
        "checkpoint although its numbers change with them; any other difference in such keys is refused.",
    )
    load_weights: str | None = key(
        None,
        "Checkpoint whose weights (only) a new run starts from; with resume=auto where there is nothing to continue.",
    )
