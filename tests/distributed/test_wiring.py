"""Wrong wiring is refused before the first step; the auxiliary losses' scale does not depend on accumulation."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed.cases import BASE, VOCAB, merged, tokens_of
from tests.distributed.zero_checks import built

pytestmark = pytest.mark.distributed


@contextlib.contextmanager
def sabotage(kind: str, model: torch.nn.Module, expert_parallel: int) -> Iterator[None]:
    """Break one thing of the wiring while the engine is built."""
    import deepspeed.utils.groups as tables
    from megatron.core import parallel_state

    from adamoe_dist.parallel import engine as engine_module

    name = f"ep_size_{expert_parallel}"
    original_groups, original_initialize = engine_module.parameter_groups, engine_module._initialize
    if kind == "unflagged":
        next(p for n, p in model.named_parameters() if "weight1" in n).tensor_model_parallel = False
    elif kind == "data group for experts":
        tables._EXPERT_DATA_PARALLEL_GROUP[name] = parallel_state.get_data_parallel_group()
    elif kind == "swapped groups":
        tables._EXPERT_DATA_PARALLEL_GROUP[name] = parallel_state.get_expert_model_parallel_group()
        tables._EXPERT_PARALLEL_GROUP[name] = parallel_state.get_expert_data_parallel_group()

    def without_one(*arguments: Any) -> Any:
        groups = original_groups(*arguments)
        groups[0]["params"] = groups[0]["params"][1:]
        return groups

    def without_experts(model: Any, optimizer: Any, settings: Any, expert_counts: Any) -> Any:
        return original_initialize(model, optimizer, settings, ())

    original_marks = engine_module.mark_experts

    def without_marks(*arguments: Any) -> None:
        original_marks(*arguments)
        experts = [parameter for parameter in model.parameters() if getattr(parameter, "is_expert", False)]
        for parameter in experts if kind == "unmarked" else experts[-1:]:
            parameter.allreduce = True

    with contextlib.ExitStack() as stack:
        if kind in ("unmarked", "one unmarked"):
            stack.enter_context(mock.patch.object(engine_module, "mark_experts", without_marks))
        if kind == "missing parameter":
            stack.enter_context(mock.patch.object(engine_module, "parameter_groups", without_one))
        if kind == "no experts":
            stack.enter_context(mock.patch.object(engine_module, "_initialize", without_experts))
        yield


def build(kind: str, expert_parallel: int, stage: int) -> str:
    """Build an engine on every rank and return what was refused, or nothing."""
    from adamoe_dist.parallel import WiringError

    changes = {"parallel": {"expert": expert_parallel}, "zero": {"stage": stage}}
    try:
        with built(changes, "fp32", lambda model: sabotage(kind, model, expert_parallel)):
            return ""
    except WiringError as refusal:
        return str(refusal)


MARKS = [
    ("unflagged", 2, "would count in the gradient norm on the first tensor-parallel rank only"),
    ("unmarked", 2, "would be reduced over all data-parallel ranks"),
    ("one unmarked", 2, "would be reduced over all data-parallel ranks"),
]
ENGINES = [
    ("no experts", 2, "has_moe_layers=False"),
    ("data group for experts", 2, "overwritten by a broadcast|must be over"),
    ("swapped groups", 4, "overwritten by a broadcast|must be over"),
    ("missing parameter", 2, "no optimizer group holds"),
]
WRONG = [(*mark, 1) for mark in MARKS] + [(*wrong, stage) for wrong in ENGINES for stage in range(4)]
"""Marks are read before there is an engine, so that the stage does not matter to them."""


@pytest.mark.parametrize(("kind", "world", "message", "stage"), WRONG)
def test_wrong_wiring_is_refused(ranks_of, kind, world, message, stage):
    refusals = ranks_of(world).run(build, kind, 2, stage, timeout_s=60.0)
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(next((refusal for refusal in refusals if refusal), "nothing was refused"))
    if kind not in ("data group for experts", "swapped groups"):
        assert all(refusals)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_right_wiring_is_accepted(ranks_of, world):
    for stage in (0, 1, 3):
        assert ranks_of(world).run(build, "nothing", min(world, 2), stage) == [""] * world


def balance_gradients(micro_batches: int) -> dict[str, torch.Tensor]:
    """Gradients of the auxiliary losses alone, the same data in each micro-batch."""
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups
    from tests.distributed.cases import GradientCapture

    launch = Launch.from_environment()
    config = config_from_dict(merged(BASE, {"train": {"global_batch_size": 16}, "parallel": {"expert": 1}}))
    resolved = resolve(config, launch.world_size)
    initialize_groups(launch, resolved)
    try:
        torch.manual_seed(1)
        model = build_model(config, resolved, VOCAB, torch.float32, cuda=False).model
        engine = TrainingEngine(model, config, resolved, torch.float32, config.moe.num_experts)
        capture = GradientCapture(model)
        tokens = tokens_of(0, 2, config.model.sequence_length)
        engine.start_step(micro_batches)
        for _ in range(micro_batches):
            engine.backward(engine(tokens).mean() * 0.0)
        result = capture.reduced(resolved.layout)
        engine.step()
        result["norm"] = torch.tensor(engine.gradient_norm())
        engine.close()
        return result
    finally:
        destroy_groups()


def test_auxiliary_losses_do_not_grow_with_accumulation(ranks_of):
    ranks = ranks_of(1)
    (once,), (four,) = ranks.run(balance_gradients, 1), ranks.run(balance_gradients, 4)
    touched = [name for name, gradient in once.items() if "router" in name and gradient.norm() > 0]
    assert len(touched) == 6
    for name, gradient in once.items():
        torch.testing.assert_close(four[name], gradient, rtol=1e-5, atol=1e-9)
