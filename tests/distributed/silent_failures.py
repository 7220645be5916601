"""Ways to train wrongly without a message: each takes one remedy of this project away, on the rank that calls it."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.distributed import cases
from tests.distributed.cases import Outcome
from tests.distributed.zero_checks import built, train_in_fp16

Replace = Callable[[Any, str, Any], None]


@contextlib.contextmanager
def without(remedy: str | None) -> Iterator[None]:
    """Take a remedy away for a while; None: none."""
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        if remedy is not None:
            REMEDIES[remedy](replace)
        yield


def _drop_setting(name: str) -> Callable[[Replace], None]:
    def take_away(replace: Replace) -> None:
        from adamoe_dist.parallel import engine

        original = engine.deepspeed_config

        def settings(*arguments: Any) -> dict[str, Any]:
            return {key: value for key, value in original(*arguments).items() if key != name}

        replace(engine, "deepspeed_config", settings)

    return take_away


def _skip(name: str) -> Callable[[Replace], None]:
    """Do nothing where the engine calls a function that mends something."""

    def take_away(replace: Replace) -> None:
        from adamoe_dist.parallel import engine

        replace(engine, name, lambda *_: None)

    return take_away


def _auxiliary_scale(scale: Callable[[Any, int], float]) -> Callable[[Replace], None]:
    def take_away(replace: Replace) -> None:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        from adamoe_dist.parallel import TrainingEngine

        def set_scale(engine: Any, micro_batches: int) -> None:
            MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale(engine, micro_batches)))

        replace(TrainingEngine, "_set_auxiliary_scale", set_scale)

    return take_away


def _forget_expert_tensor_ranks(replace: Replace) -> None:
    import deepspeed.utils.groups as tables
    from megatron.core import parallel_state

    from adamoe_dist.parallel import groups

    original = groups.register_expert_groups

    def register(layout: Any) -> None:
        original(layout)
        for name in tables._EXPERT_PARALLEL_GROUP:
            tables._EXPERT_PARALLEL_GROUP[name] = parallel_state.get_expert_model_parallel_group()

    replace(groups, "register_expert_groups", register)


def _draw_by_rank(replace: Replace) -> None:
    """The weights of layers; experts' have draws of their own."""
    from adamoe_dist.model import build

    class SeedByRank(np.random.SeedSequence):
        def __init__(self, entropy: tuple[int, ...]) -> None:
            super().__init__((*entropy, torch.distributed.get_rank()))

    replace(build, "np", SimpleNamespace(random=SimpleNamespace(SeedSequence=SeedByRank)))


def _reduce_over_data_ranks_only(replace: Replace) -> None:
    from megatron.core import parallel_state

    from adamoe_dist.parallel.groups import MegatronTopology

    replace(MegatronTopology, "get_data_parallel_group", lambda _: parallel_state.get_data_parallel_group())


def _change_marks(change: Callable[[torch.nn.Module], None]) -> Callable[[Replace], None]:
    def take_away(replace: Replace) -> None:
        from adamoe_dist.parallel import engine

        original = engine.mark_experts

        def mark(model: torch.nn.Module, layout: Any) -> None:
            original(model, layout)
            change(model)

        replace(engine, "mark_experts", mark)

    return take_away


def _forget_family(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if hasattr(parameter, "ds_zero_placement_family"):
            del parameter.ds_zero_placement_family


def _forget_one_sum(model: torch.nn.Module) -> None:
    next(p for name, p in model.named_parameters() if name.endswith("null_weight")).sequence_parallel = False  # type: ignore[attr-defined]


def _register_backwards(replace: Replace) -> None:
    from adamoe_dist.parallel import engine

    original = engine.parameter_groups

    def groups(*arguments: Any) -> list[dict[str, Any]]:
        made = original(*arguments)
        if torch.distributed.get_rank() == 1:
            for group in made:
                group["params"].reverse()
        return made

    replace(engine, "parameter_groups", groups)


REMEDIES: dict[str, Callable[[Replace], None]] = {
    "clipping": _drop_setting("gradient_clipping"),
    "fp32 sums": _drop_setting("data_types"),
    "fp32 on the way": _drop_setting("communication_data_type"),
    "sums over tensor ranks": _skip("sum_over_tensor_ranks"),
    "tied embedding": _skip("tied_embedding"),
    "expert-tensor ranks in the norm": _forget_expert_tensor_ranks,
    "auxiliary losses over micro-batches": _auxiliary_scale(lambda engine, _: engine.loss_scale),
    "auxiliary losses times the loss scale": _auxiliary_scale(lambda _, micro_batches: 1.0 / micro_batches),
    "one draw for all ranks": _draw_by_rank,
    "context ranks among the data ranks": _reduce_over_data_ranks_only,
    "family of experts": _change_marks(_forget_family),
    "mark of a weight to be summed": _change_marks(_forget_one_sum),
    "one order of registration": _register_backwards,
}


def train_without(remedy: str | None, *arguments: Any) -> Outcome:
    """Train as :func:`tests.distributed.cases.train` does; whether replicas are equal in the end is not looked at."""
    *others, precision = arguments
    with without(remedy), mock.patch.object(cases, "require_equal_replicas", lambda _: None):
        return train_in_fp16(*others) if precision == "fp16" else cases.train(*others, precision)


def unequal_without(remedy: str | None, changes: dict[str, Any]) -> str:
    """Train on data-parallel ranks and return which weight they do not hold alike, or nothing."""
    try:
        with without(remedy):
            cases.train(changes, 1, 1)
    except AssertionError as finding:
        return str(finding)
    return ""


def refused_without(remedy: str | None, changes: dict[str, Any]) -> str:
    """Build an engine and return how that was refused, or nothing."""
    from adamoe_dist.parallel import WiringError

    try:
        with built(changes, "fp32", lambda _: without(remedy)):
            return ""
    except WiringError as refusal:
        return str(refusal)
