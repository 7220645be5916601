"""Saving at intervals and starting from what was saved."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from adamoe_dist.checkpoint import load_checkpoint, load_weights, save_checkpoint
from adamoe_dist.config import Config, Resolved
from adamoe_dist.training.callback import Callback, StepResult
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.run_directory import checkpoint_root

logger = logging.getLogger(__name__)


class CheckpointWriter(Callback):
    """Saves every ``checkpoint.interval`` steps, after the last step, and when a signal ends the run."""

    def __init__(self, tokenizer_fingerprint: str, dtype: torch.dtype) -> None:
        self._tokenizer_fingerprint = tokenizer_fingerprint
        self._dtype = dtype

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save if it is due."""
        interval = trainer.config.checkpoint.interval
        if not trainer.is_last_step and (interval is None or result.step % interval):
            return
        path = save_checkpoint(
            checkpoint_root(trainer.config),
            result.step,
            trainer.engine,
            state={
                "step": trainer.step,
                "tokens_seen": trainer.tokens_seen,
                "data": trainer.batches.state_dict(),
                "tokenizer_fingerprint": self._tokenizer_fingerprint,
            },
            config=trainer.config.to_dict(),
            layout=layout(trainer.config, trainer.resolved, self._dtype),
            keep_last=trainer.config.checkpoint.keep_last,
        )
        logger.info("saved %s", path)


def layout(config: Config, resolved: Resolved, dtype: torch.dtype) -> dict[str, Any]:
    """Return how a run is cut, for a checkpoint's manifest."""
    return {
        **dataclasses.asdict(resolved.layout),
        "zero_stage": config.zero.stage,
        "precision": str(dtype).removeprefix("torch."),
    }


def restore(trainer: Trainer, source: Path | None) -> None:
    """Continue from checkpoint ``source``, take only its weights with ``checkpoint.load_weights``, or start new."""
    if source is None:
        return
    if trainer.config.checkpoint.load_weights:
        new_buffers = load_weights(source, trainer.engine)
        logger.info("starting from the weights of %s", source)
        if new_buffers:
            logger.info("it was trained without moe.router.target_load: the selection bias of every layer starts at 0")
        return
    state = load_checkpoint(source, trainer.engine)
    trainer.step = int(state["step"])
    trainer.tokens_seen = int(state["tokens_seen"])
    trainer.batches.load_state_dict(state["data"])
    logger.info("continuing from %s after step %d", source, trainer.step)
