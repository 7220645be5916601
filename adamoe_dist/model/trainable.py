"""Which weights are trained: the others are frozen, and have neither gradient nor optimizer state."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from adamoe_dist.config import Config
from adamoe_dist.errors import UserError
from adamoe_dist.model.adapters import add_adapters, is_adapter
from adamoe_dist.model.build import LanguageModel
from adamoe_dist.model.parts import is_tied_copy, local_names

KEY = "finetune.trainable"
EMBEDDING = "embedding.word_embeddings.weight"
SHORTCUTS = {
    "router": ("*.mlp.router.*",),
    "experts": ("*.mlp.experts.*",),
    "attention": ("*.self_attention.*",),
    "null_experts": ("*.mlp.router.null_weight", "*.mlp.null_experts.*"),
    "norms": ("*layernorm*",),
    "embeddings": ("embedding.*", "output_layer.*"),
}
"""Patterns of canonical names that a word stands for."""

_NAMES_SHOWN = 3


def choose_trained(model: LanguageModel, config: Config) -> str | None:
    """Add the adapters of ``finetune.lora`` and freeze what ``finetune.trainable`` leaves out. Collective.

    Call it before the engine is built.

    Returns:
        A line that says how much is trained; None where everything is.

    Raises:
        UserError: a pattern matches no weight, or nothing is trained on some pipeline stage.
    """
    wanted, lora = config.finetune.trainable, config.finetune.lora
    if wanted == "all" and lora.rank is None:
        return None
    patterns: list[str] | Literal["all"] = [] if wanted == "all" and lora.rank is not None else wanted
    names = _weights(model)
    everyone = _over_ranks(sorted(names))
    if lora.rank is not None:
        add_adapters(model, lora, config.run.seed)
        names = _weights(model)
    assert patterns != "all"
    check_trainable(patterns, sorted(set().union(*everyone)))
    for name, parameters in names.items():
        for parameter in parameters:
            parameter.requires_grad_(is_adapter(name) or is_chosen(name, patterns))
    trained = [name for name, parameters in names.items() if parameters[0].requires_grad]
    _require_work_everywhere(trained)
    if config.train.recompute != "none" and model.is_first_stage:
        _let_gradients_reach_recomputed_layers(model)
    elements = [_elements(names, trained), _elements(names, list(names))]
    return f"trained: {len(trained)} of {len(names)} weights of this stage, {elements[0]:,} of {elements[1]:,} numbers"


def is_chosen(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a canonical name is one that shortcuts and patterns name."""
    return any(fnmatchcase(name, pattern) for word in patterns for pattern in SHORTCUTS.get(word, (word,)))


def check_trainable(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a shortcut or a pattern that matches none of a model's weights.

    Args:
        patterns: of ``finetune.trainable``.
        names: canonical names of the weights.

    Raises:
        UserError: naming it, and what is near and matches.
    """
    for word in patterns:
        if not any(is_chosen(name, [word]) for name in names):
            usable = [shortcut for shortcut in SHORTCUTS if any(is_chosen(name, [shortcut]) for name in names)]
            near = difflib.get_close_matches(word, [*usable, *names], n=_NAMES_SHOWN, cutoff=0.3)
            raise UserError(
                f"{KEY} names {word!r}, which matches no weight of the model; nearest: "
                f"{', '.join(near or [*usable, names[0]])}"
            )


def _weights(model: LanguageModel) -> dict[str, list[torch.nn.Parameter]]:
    """Return the weights by canonical name; a tied copy goes with the embedding."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in local_names(model):
        found.setdefault(EMBEDDING if is_tied_copy(parameter) else name, []).append(parameter)
    return found


def _require_work_everywhere(trained: list[str]) -> None:
    """An optimizer without weights cannot be built; experts' ranks all have the same names, stages have not."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    without = {stage for stage, names in _over_ranks((stage, trained)) if not names}
    if without:
        listed = ", ".join(str(number + 1) for number in sorted(without))
        raise UserError(
            f"{KEY} trains nothing on pipeline stage {listed}; name a weight there too, such as norms, or set "
            "parallel.pipeline=1"
        )


def _over_ranks(value: object) -> list:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _elements(weights: dict[str, list[torch.nn.Parameter]], names: list[str]) -> int:
    return sum(weights[name][0].numel() for name in names)


def _let_gradients_reach_recomputed_layers(model: LanguageModel) -> None:
    """Have the embedding's output want a gradient: without, a recomputed layer gives its weights none."""

    def wanting(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        return output.detach().requires_grad_()

    model.gpt.embedding.register_forward_hook(wanting)
