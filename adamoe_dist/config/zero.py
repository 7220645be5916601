"""Section ``zero``: DeepSpeed's optimizer sharding."""

from dataclasses import dataclass
from typing import Any, Literal

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class ZeroConfig:
    """ZeRO over Megatron's data-parallel and expert-data-parallel groups."""

    stage: Literal[1, 2] = key(1, "1: optimizer state sharded; 2: gradients too.")
    deepspeed: dict[str, Any] = key(
        {}, "Further DeepSpeed keys, passed through as they are; a key that this tree owns is refused."
    )
