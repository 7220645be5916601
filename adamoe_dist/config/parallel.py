"""Section ``parallel``: how the model is cut over the ranks."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; the data-parallel degree is what the world size leaves."""

    tensor: int = key(1, "Ranks that share each dense matrix.", at_least=1)
    pipeline: int = key(1, "Pipeline stages.", at_least=1)
    context: int = key(1, "Ranks that share each sequence.", at_least=1)
    expert: int | Literal["auto"] = key(
        "auto",
        "Ranks over which the true experts are spread; auto: the largest that divides both the data-parallel "
        "ranks and moe.num_experts.",
        at_least=1,
    )
    expert_tensor: int = key(1, "Ranks that share each expert's matrices.", at_least=1)
