"""Validation loss and bits per byte."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from adamoe_dist.data import TokenDataset, validation_batches
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
def validate(trainer: Trainer, datasets: list[TokenDataset]) -> Validation:
    """Evaluate on the first ``train.validation_samples`` samples of each set, in order. Collective.

    Every rank makes the same number of passes; a sample that fills up the last one weighs nothing.
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
        for tokens, weights in batches:
            losses = trainer.schedule.losses(tokens.to(trainer.device))
            if losses is None:  # only the last stage has them
                continue
            weighted = losses.double().mean(dim=1) * weights.to(trainer.device)
            samples = weights.double().sum()
            totals += torch.stack([weighted.sum(), samples.to(trainer.device), samples * dataset.bytes_per_token])
    dist.all_reduce(totals)
    nats, samples, byte_scale = totals.tolist()
    trainer.engine.train()
    tokens_in_sets = sum(dataset.tokens for dataset in datasets)
    return Validation(
        loss=nats / samples,
        bits_per_byte=nats / byte_scale / math.log(2.0),
        unigram_entropy=sum(d.info.unigram_entropy * d.tokens for d in datasets) / tokens_in_sets,
    )
