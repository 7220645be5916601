"""Section ``zero``: DeepSpeed's optimizer sharding."""

from dataclasses import dataclass
from typing import Any, Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class ZeroConfig:
    """ZeRO over Megatron's data-parallel and expert-data-parallel groups."""

    stage: Literal[0, 1, 2, 3] = key(
        1,
        "0: nothing sharded; 1: optimizer state; 2: gradients too; 3 (experimental): weights too, gathered layer by "
        "layer.",
    )
    offload_optimizer: bool = key(
        False, "Keep the optimizer's state in CPU memory and update there; for stages 1 to 3."
    )
    deepspeed: dict[str, Any] = key(
        {}, "Further DeepSpeed keys, passed through as they are; a key that this tree owns is refused."
    )
