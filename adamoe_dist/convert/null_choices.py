"""Null experts for a model that comes without: what its import adds, and what its output is at the first step.

Axes: E true experts, N null experts (rows that score them: one for all with ``null_init=shared``), H hidden size.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adamoe_dist.checkpoint import drawn_null_rows
from adamoe_dist.config import Config, config_from_dict, model_problems
from adamoe_dist.convert.importing import ImportPlan
from adamoe_dist.convert.mapping import layer_prefix
from adamoe_dist.errors import UserError
from adamoe_dist.routing import NullInit, same_weights

SHUTTING_BIAS = 1.0
"""On every true expert, it lets none of the null ones be selected: scores are between 0 and 1."""

GENTLE_BIAS_RATE = 0.2
"""``moe.router.bias_rate`` on the way from there: at the default of 0.5 the bias, which no token's selection tells how
far it still has to go, arrives in steps so long that the load falls to less than half of the target for a while."""


@dataclass(frozen=True)
class NullChoice:
    """The null experts that a model is to get.

    Attributes:
        num_null: M; 0 leaves the model as it is.
        top_k: slots K of a token; None: as many as the model selects experts.
        null_init: how the rows are drawn that score null experts.
        seed: of what is drawn.
        target_load: true experts a token that training is to hold; None: none is held.
        preserves_output: the first step's output is the model's without null experts.
    """

    num_null: int
    top_k: int | None = None
    null_init: NullInit = "copy"
    seed: int = 0
    target_load: float | None = None
    preserves_output: bool = False


def with_null_experts(plan: ImportPlan, choice: NullChoice) -> ImportPlan:
    """Return the plan of an import that adds null experts; without any, the plan itself.

    Each MoE layer gets its null rows, and where a load is held a selection bias for its true experts: zero, or what
    shuts all null experts out (:data:`SHUTTING_BIAS`), from where training moves it. A model whose weights are plain
    scores keeps them: its softmax stays over the true experts (``moe.router.normalize=all_true``).

    Raises:
        UserError: the choice is contradictory, or makes no model that can be trained.
    """
    _check_choice(plan, choice)
    if choice.num_null == 0:
        return plan
    tree = _changed_tree(plan.config, choice)
    config = config_from_dict(tree)
    problems = model_problems(config)
    if problems:
        slots = "" if choice.top_k is None else f" --top-k {choice.top_k}"
        raise UserError(f"--num-null-experts {choice.num_null}{slots}: {'; '.join(problems)}")
    additions = dict(plan.additions)
    for layer in config.moe_layers:
        router = f"{layer_prefix(layer)}mlp.router"
        additions[f"{router}.null_weight"] = partial(_null_rows, plan, choice, layer)
        if choice.target_load is not None:
            start = SHUTTING_BIAS if choice.preserves_output else 0.0
            additions[f"{router}.expert_bias"] = partial(torch.full, (config.moe.num_experts,), start)
    return replace(plan, config=config, additions=additions)


def router_weight(plan: ImportPlan, layer: int) -> Tensor:
    """Return the rows (E, H) that score a layer's true experts, in fp32."""
    name = f"{layer_prefix(layer)}mlp.router.weight"
    return plan.additions[name]() if name in plan.additions else plan.tensor(name)


def _check_choice(plan: ImportPlan, choice: NullChoice) -> None:
    own, already = plan.config.moe.top_k, plan.config.moe.num_null_experts
    options = {
        f"--num-null-experts {choice.num_null}": choice.num_null != 0,
        "--preserve-output": choice.preserves_output,
        "--target-load": choice.target_load is not None,
        "--top-k": choice.top_k not in (None, own),
    }
    asked = [option for option, is_given in options.items() if is_given]
    if asked and already:
        raise UserError(
            f"{asked[0]}: the model of {plan.source.path} has {already} null experts already; import it without this "
            "option and give the checkpoint another number with the command set-null-experts"
        )
    if choice.num_null == 0:
        if asked:
            raise UserError(f"{asked[0]} says something of null experts; give their number with --num-null-experts M")
        return
    if choice.num_null < 0:
        raise UserError(f"--num-null-experts {choice.num_null} must not be negative")
    if not choice.preserves_output:
        if choice.top_k is None:
            raise UserError(
                f"--num-null-experts {choice.num_null} needs --top-k K, the slots that a token fills with true or null "
                f"experts (the model selects {own} experts; at balance K n / (n + M) are true), or --preserve-output"
            )
        return
    if choice.target_load is None:
        raise UserError(
            f"--preserve-output starts with all null experts shut out and needs --target-load L, below {own}, which "
            "lets them in"
        )
    if choice.top_k not in (None, own):
        raise UserError(
            f"--top-k {choice.top_k} with --preserve-output would give a token {choice.top_k} true experts at first, "
            f"and the model selects {own}; leave --top-k out"
        )


def _changed_tree(config: Config, choice: NullChoice) -> dict[str, Any]:
    tree = config.to_dict()
    moe, router = tree["moe"], tree["moe"]["router"]
    moe["num_null_experts"] = choice.num_null
    moe["top_k"] = choice.top_k if choice.top_k is not None else moe["top_k"]
    if moe["reference_top_k"] is None:
        moe["reference_top_k"] = config.moe.top_k
    router["null_init"] = choice.null_init
    router["target_load"] = choice.target_load
    if choice.preserves_output:
        router["bias_rate"] = GENTLE_BIAS_RATE
    router["normalize"] = same_weights(router["normalize"], router["score_function"], choice.num_null)
    return tree


def _null_rows(plan: ImportPlan, choice: NullChoice, layer: int) -> Tensor:
    weight_EH, std = router_weight(plan, layer), plan.config.model.init_std
    return drawn_null_rows(choice.null_init, weight_EH, choice.num_null, std, choice.seed, layer)
