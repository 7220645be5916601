"""The families, a file each but for the dense ones."""

from typing import Any

from adamoe_dist.convert.families.adamoe import AdaMoE
from adamoe_dist.convert.families.deepseek import DeepSeek
from adamoe_dist.convert.families.dense import Llama, Mistral, Qwen3
from adamoe_dist.convert.families.mixtral import Mixtral
from adamoe_dist.convert.families.olmoe import OLMoE
from adamoe_dist.convert.families.qwen2_moe import Qwen2MoE
from adamoe_dist.convert.families.qwen3_moe import Qwen3MoE
from adamoe_dist.convert.family import Family
from adamoe_dist.errors import UserError

VANILLA: tuple[Family, ...] = (Mixtral(), OLMoE(), Qwen3MoE(), Qwen2MoE())
"""Families that a run's model is exported to, tried in this order."""

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (*VANILLA, DeepSeek(), Llama(), Mistral(), Qwen3(), AdaMoE())
}


def family_of(values: dict[str, Any], source: str = "config.json") -> Family:
    """Return the family that a ``config.json`` names.

    Raises:
        UserError: it names none, or one that is not known.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{source}: model_type={kind!r} is not a family that is known here; choose a model of {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]
