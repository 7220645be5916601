"""Section ``train``: steps, batches, precision."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int = key(100, "Optimizer steps to run in all (resumed steps included).", at_least=1)
    global_batch_size: int = key(16, "Samples an optimizer step over all ranks.", at_least=1)
    micro_batch_size: int | Literal["auto"] = key(
        "auto",
        "Samples a rank puts through the model at once; auto: the largest divisor of the rank's share of at most "
        "16384 tokens.",
        at_least=1,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key(
        "auto",
        "fp32, bf16, or fp16 with dynamic loss scaling on CUDA (masters, accumulation and gradient reduction are "
        "fp32); auto: bf16 on CUDA, fp32 on CPU.",
    )
    recompute: Literal["none", "selective", "full"] = key(
        "none",
        "Activations computed again in the backward pass instead of kept. selective: those inside true experts, the "
        "shared expert and dense feed-forward layers, with no communication; full: all inside each layer, dispatch "
        "and its all-to-all included.",
    )
    gradient_clipping: float = key(1.0, "Largest global gradient norm (0: no clipping).", at_least=0)
    max_bad_steps: int = key(
        3,
        "Steps in a row with a NaN or infinite loss or gradient after which the run stops with exit code 3; each is "
        "skipped and its batch left out. 1: stop at the first.",
        at_least=1,
    )
    validation_interval: int | None = key(
        None, "Validate every so many steps and at the end; null: only at the start and the end.", at_least=1
    )
    validation_samples: int | None = key(None, "Validation samples a pass at most; null: all.", at_least=1)
