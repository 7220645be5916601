"""Validation loss and bits per byte."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from adamoe_dist.data import Dataset, MicroBatch, validation_batches
from adamoe_dist.parallel import data_parallel_rank
from adamoe_dist.training.loop import Trainer


@dataclass(frozen=True)
class Validation:
    """The model's loss on the validation sets and what it is measured against."""

    loss: float
    """Nats a token."""
    bits_per_byte: float
    """The loss over the text's UTF-8 bytes."""
    unigram_entropy: float
    """Nats a token of a model that knows only each token's frequency in these sets."""


@torch.no_grad()
def validate(trainer: Trainer, datasets: Sequence[Dataset]) -> Validation:
    """Evaluate on the first ``train.validation_samples`` samples of each set, in order. Collective.

    Every rank makes the same number of passes; a sample that fills up the last one weighs nothing, and nor does a token
    that the loss is not of.
    """
    trainer.engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=trainer.device)
    for dataset in datasets:
        batches = validation_batches(
            dataset,
            trainer.resolved.micro_batch_size,
            data_parallel_rank(),
            trainer.resolved.data_parallel,
            trainer.config.train.validation_samples,
        )
        for batch, weights in batches:
            losses = trainer.schedule.losses(batch.to(trainer.device))
            if losses is None:  # only the last stage has them
                continue
            nats, counted = _sums(trainer, losses, batch, weights.to(trainer.device))
            totals += torch.stack([nats, counted, counted * dataset.bytes_per_token])
    dist.all_reduce(totals)
    nats, counted_in_all, byte_scale = totals.tolist()
    trainer.engine.train()
    tokens_in_sets = sum(dataset.tokens for dataset in datasets)
    return Validation(
        loss=nats / counted_in_all,
        bits_per_byte=nats / byte_scale / math.log(2.0),
        unigram_entropy=sum(d.unigram_entropy * d.tokens for d in datasets) / tokens_in_sets,
    )


def _sums(
    trainer: Trainer, losses: torch.Tensor, batch: MicroBatch, weights_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nats and what they are a mean over, 0-d fp64: samples of one length, or the tokens that count."""
    if batch.loss_mask is None:
        return (losses.double().mean(dim=1) * weights_B).sum(), weights_B.double().sum()
    counts = trainer.model.own_part(batch.loss_mask).to(losses.device).double() * weights_B.double().unsqueeze(1)
    return (losses.double() * counts).sum(), counts.sum()
