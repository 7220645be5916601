"""Saving at intervals and starting from what was saved."""

import dataclasses
import logging
from typing import Any

import torch

from adamoe_dist.checkpoint import CheckpointSaver, Retention, Start, load_checkpoint, load_weights
from adamoe_dist.config import Config, Resolved
from adamoe_dist.timing import SAVE
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.run_directory import checkpoint_root

logger = logging.getLogger(__name__)


class CheckpointWriter(Callback):
    """Saves every ``checkpoint.interval`` steps, after the last step, and when a signal ends the run."""

    def __init__(self, config: Config, tokenizer_fingerprint: str, dtype: torch.dtype) -> None:
        """Prepare to save; all ranks call it together."""
        settings = config.checkpoint
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._dtype = dtype
        self._saver = CheckpointSaver(
            checkpoint_root(config),
            Retention(settings.keep_last, settings.keep_every),
            in_background=settings.asynchronous,
            goes_on_after_failure=settings.on_failure == "continue",
        )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save if it is due; the last one is waited for."""
        interval = trainer.config.checkpoint.interval
        if trainer.is_last_step or (interval is not None and result.step % interval == 0):
            with trainer.ranges(SAVE):
                self.save(trainer)
        else:
            self._saver.poll()
        self._report(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save the present state."""
        self._saver.save(
            trainer.step,
            trainer.engine,
            state={
                "step": trainer.step,
                "tokens_seen": trainer.tokens_seen,
                "data": trainer.batches.state_dict(),
                "loss_scale": trainer.engine.loss_scale_state(),
                "tokenizer_fingerprint": self._tokenizer_fingerprint,
            },
            config=trainer.config.to_dict(),
            layout=layout(trainer.config, trainer.resolved, self._dtype),
            is_last=trainer.is_last_step,
        )

    def close(self) -> None:
        """Let a save in progress end, when an exception ends the run."""
        self._saver.close()

    def _report(self, trainer: Trainer) -> None:
        """Add what saving took to the next record."""
        times = self._saver.take_times()
        trainer.seconds["save_stall"] += times.stall_s
        trainer.seconds["save_write"] += times.write_s
        trainer.events["saves_failed"] += times.failed


def layout(config: Config, resolved: Resolved, dtype: torch.dtype) -> dict[str, Any]:
    """Return how a run is cut, for a checkpoint's manifest."""
    return {
        **dataclasses.asdict(resolved.layout),
        "zero_stage": config.zero.stage,
        "precision": str(dtype).removeprefix("torch."),
    }


def restore(trainer: Trainer, start: Start | None) -> None:
    """Continue from a checkpoint, take only its weights, or start new."""
    if start is None:
        return
    if start.weights_only:
        new_buffers = load_weights(start.path, trainer.engine)
        logger.info("starting from the weights of %s", start.path)
        if new_buffers:
            logger.info("it was trained without moe.router.target_load: the selection bias of every layer starts at 0")
        return
    state = load_checkpoint(start.path, trainer.engine)
    trainer.engine.load_loss_scale_state(state.get("loss_scale"))
    trainer.step = int(state["step"])
    trainer.tokens_seen = int(state["tokens_seen"])
    trainer.batches.load_state_dict(state["data"])
    logger.info("continuing from %s after step %d", start.path, trainer.step)
