"""Section ``optimizer``."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class OptimizerConfig:
    """The weight update."""

    type: Literal["adamw", "sgd"] = key("adamw", "adamw (decoupled weight decay) or plain sgd.")
    implementation: Literal["auto", "torch", "apex", "deepspeed_cpu"] = key(
        "auto",
        "torch: torch.optim (fused on CUDA); apex: NVIDIA apex FusedAdam, refused where it is not installed; "
        "deepspeed_cpu: DeepSpeed's CPU Adam, for zero.offload_optimizer; auto: deepspeed_cpu with "
        "zero.offload_optimizer where it can be compiled, apex where CUDA and NVIDIA apex are present, else torch.",
    )
    learning_rate: float = key(3e-4, "Peak learning rate.", above=0)
    beta1: float = key(0.9, "Decay of AdamW's first moment.", at_least=0, below=1)
    beta2: float = key(0.95, "Decay of AdamW's second moment.", at_least=0, below=1)
    epsilon: float = key(1e-8, "AdamW's denominator offset.", above=0)
    weight_decay: float = key(
        0.1, "Weight decay of matrices, not of norms: decoupled with adamw, added to the gradient with sgd.", at_least=0
    )
