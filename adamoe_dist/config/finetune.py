"""Section ``finetune``: what launch/finetune.py does besides; launch/pretrain.py refuses a tree that sets it."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key, section


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on weights that stay as they are."""

    rank: int | None = key(
        None,
        "Rank r of the adapters: a weight W is used as W + alpha/r B A, and only A and B are trained; null: none.",
        at_least=1,
    )
    alpha: float = key(16.0, "Scale of the adapters, over r.", above=0)
    targets: list[str] = key(
        ["attention", "experts"],
        "What has adapters: attention (query, key, value and output projections), experts (each true expert's own).",
    )


@dataclass(kw_only=True)
class FinetuneConfig:
    """Fine-tuning on prompts and completions, or on conversations."""

    loss_on: Literal["completions", "all"] = key(
        "completions", "Tokens that the loss is of: completions and assistant turns, or prompts and other turns too."
    )
    packing: bool = key(
        False,
        "Put several examples into a sequence, end-of-document tokens between them, across which attention looks as in "
        "pre-training; false: one example a sequence. The rest of a sequence is padding, which is routed nowhere.",
    )
    too_long: Literal["refuse", "truncate", "skip"] = key(
        "refuse", "What becomes of an example of more than model.sequence_length + 1 tokens; reported."
    )
    epochs: float | None = key(
        None, "Passes over data.train, from which train.steps follows (rounded up); null: train.steps.", above=0
    )
    anneal_epochs: float | None = key(
        None,
        "Passes over data.train from which moe.router.balance.anneal_steps follows (rounded up); null: that key.",
        above=0,
    )
    trainable: Literal["all"] | list[str] = key(
        "all",
        "Weights that are trained: all, or a list of shortcuts (router, experts, attention, null_experts, norms, "
        "embeddings) and patterns of names, such as [router, 'decoder.layers.1.*']; the others are frozen. With "
        "lora.rank the adapters are, and besides them only what a list names.",
    )
    lora: LoraConfig = section(LoraConfig, "Low-rank adapters.")

    def __post_init__(self) -> None:
        """Take ``[all]`` for ``all``."""
        if self.trainable == ["all"]:
            self.trainable = "all"
