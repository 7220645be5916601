"""Section ``checkpoint``: when to save and what to start from."""

from dataclasses import dataclass

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming."""

    interval: int | None = key(
        None, "Save every so many steps; the last step is always saved; null: only that.", at_least=1
    )
    keep_last: int | None = key(None, "Complete checkpoints kept, older ones are removed; null: all.", at_least=1)
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
    load_weights: str | None = key(None, "Checkpoint whose weights (only) a new run starts from.")
