"""What ranks do in the tests of ZeRO's stages."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.distributed.cases import BASE, DTYPES, VOCAB, Outcome, gathered, merged, tokens_of, train

SHARD_ALL = {"zero": {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}}
"""Without it ZeRO-3 keeps weights as small as these whole on every rank."""


def staged(changes: dict[str, Any], stage: int) -> dict[str, Any]:
    return merged(merged(changes, {"zero": {"stage": stage}}), SHARD_ALL if stage == 3 else {})


@contextlib.contextmanager
def built(
    changes: dict[str, Any],
    precision: str,
    while_built: Callable[[torch.nn.Module], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[Any]:
    """An engine in groups of its own; ``while_built(model)`` is entered while the engine is built around it."""
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups

    launch = Launch.from_environment()
    config = config_from_dict(merged(BASE, changes))
    resolved = resolve(config, launch.world_size)
    initialize_groups(launch, resolved)
    try:
        torch.manual_seed(1)
        dtype = DTYPES[precision]
        model = build_model(config, resolved, VOCAB, dtype, cuda=False).model
        with while_built(model):
            engine = TrainingEngine(model, config, resolved, dtype, config.moe.num_experts)
        yield engine
        engine.close()
    finally:
        destroy_groups()


def passes(changes: dict[str, Any], precision: str, order: str, remedy: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """One SGD step of four micro-batches whose forward (F) and backward (B or b) passes come in an order.

    b gives the gradient of the token losses from outside; without ``remedy`` DeepSpeed is not told of a new pass.
    """
    with built(changes, precision) as engine:
        rank = torch.distributed.get_rank()
        micro = tokens_of(rank, 4, 32).split(1)
        engine.start_step(len(micro))
        waiting, index = [], 0
        with contextlib.ExitStack() as stack:
            if not remedy:
                ours = mock.patch.object(type(engine), "_backward", lambda self, loss: self.deepspeed.backward(loss))
                stack.enter_context(ours)
            for letter in order:
                if letter == "F":
                    waiting.append(engine(micro[index]))
                    index += 1
                    continue
                losses = waiting.pop(0)
                if letter == "B":
                    engine.backward(losses.mean())
                else:
                    gradient = torch.full_like(losses, engine.loss_scale / (losses.numel() * len(micro)))
                    engine.backward_from(losses, gradient)
        engine.step()
        return engine.gradient_norm(), gathered(engine.model, dict(engine.model.named_parameters()))


def train_in_fp16(changes: dict[str, Any], steps: int, expert_parallel: int) -> Outcome:
    """fp16 on a CPU, where DeepSpeed would not have it."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        return train(changes, steps, expert_parallel, "fp16")


def overflow_in_fp16(changes: dict[str, Any]) -> list[tuple[bool, int, float, float]]:
    """Steps of which the second overflows on rank 0 alone: skipped, steps skipped, loss scale, change of weights."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True), built(changes, "fp16") as engine:
        rank = torch.distributed.get_rank()
        seen = []
        before = gathered(engine.model, dict(engine.model.named_parameters()))
        for step in range(3):
            loss = engine(tokens_of(step, 2, 32)).mean()
            engine.start_step(1)
            engine.backward(loss * (1e8 if step == 1 and rank == 0 else 1.0))
            engine.step()
            after = gathered(engine.model, dict(engine.model.named_parameters()))
            change = sum(float((after[name] - before[name]).norm()) for name in after)
            before = after
            seen.append((engine.is_skipped, engine.skipped_steps, engine.loss_scale, change))
        return seen


def save_in_fp16(changes: dict[str, Any], root: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Seven steps, a checkpoint after two; the loss scale's state after each later one, and the last weights."""
    from adamoe_dist.checkpoint import save_checkpoint

    with in_fp16(changes) as engine:
        scales_of_steps(engine, range(2))
        save_checkpoint(root, 2, engine, {"loss_scale": engine.loss_scale_state()}, {}, {})
        states = scales_of_steps(engine, range(2, 7))
        return states, gathered(engine.model, dict(engine.model.named_parameters()))


def resume_in_fp16(changes: dict[str, Any], path: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The same later steps by an engine that has done another step before it loads the checkpoint."""
    from adamoe_dist.checkpoint import load_checkpoint

    with in_fp16(changes) as engine:
        scales_of_steps(engine, range(10, 11))
        engine.load_loss_scale_state(load_checkpoint(path, engine)["loss_scale"])
        states = scales_of_steps(engine, range(2, 7))
        return states, gathered(engine.model, dict(engine.model.named_parameters()))


@contextlib.contextmanager
def in_fp16(changes: dict[str, Any]) -> Iterator[Any]:
    """An fp16 engine on a CPU."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True), built(changes, "fp16") as engine:
        yield engine


def scales_of_steps(engine: Any, steps: range) -> list[Any]:
    """Train; of the steps 1 and 2 the gradient overflows on rank 0. The state of the loss scale after each step."""
    states = []
    for step in steps:
        engine.deepspeed.optimizer.loss_scaler.scale_window = 2  # so that the scale grows within the test, too
        engine.start_step(1)
        is_huge = step in (1, 2) and torch.distributed.get_rank() == 0
        engine.backward(engine(tokens_of(step, 2, 32)).mean() * (1e8 if is_huge else 1.0))
        engine.step()
        states.append(engine.loss_scale_state())
    return states


def loss_scale_of_another_precision() -> Any:
    """What an fp32 engine says, after it was given the state of fp16's."""
    with built({}, "fp32") as engine:
        engine.load_loss_scale_state({"cur_scale": 4.0, "cur_iter": 1, "last_overflow_iter": 0, "skipped_steps": 1})
        return engine.loss_scale_state(), engine.loss_scale, engine.skipped_steps


def held_in_step(changes: dict[str, Any], precision: str) -> tuple[int, Any, Any]:
    """Elements of the model, and what is held between the last backward pass and the step, and after the step."""
    from adamoe_dist.parallel import live_bytes

    with built(changes, precision) as engine:
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
        engine.start_step(2)
        for micro in tokens_of(torch.distributed.get_rank(), 2, 32).split(1):
            engine.backward(engine(micro).mean())
        before = live_bytes(engine)
        engine.step()
        return elements, before, live_bytes(engine)


class _Node(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def train_with_nodes_before_norms(changes: dict[str, Any], steps: int, expert_parallel: int) -> Outcome:
    """Training in which both gradients from within a norm are added before the residual's."""
    from adamoe_dist.model.modules import RMSNorm

    original = RMSNorm.forward
    with mock.patch.object(RMSNorm, "forward", lambda self, hidden: original(self, _Node.apply(hidden))):
        return train(changes, steps, expert_parallel)


def weights_of_rank(changes: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Dense, expert and copied weights on this rank: those of the built model, and those planned."""
    from megatron.core import parallel_state

    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model, is_tied_copy
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups
    from adamoe_dist.planning import count_parameters, rank_parameters

    launch = Launch.from_environment()
    config = config_from_dict(merged(BASE, changes))
    resolved = resolve(config, launch.world_size)
    initialize_groups(launch, resolved)
    try:
        model = build_model(config, resolved, VOCAB, torch.float32, cuda=False).model
        counts = {"dense": 0.0, "expert": 0.0, "copied": 0.0}
        for parameter in model.parameters():
            kind = "expert" if getattr(parameter, "is_expert", False) else "dense"
            counts["copied" if is_tied_copy(parameter) else kind] += parameter.numel()
        embedding = count_parameters(config, config.padded_vocab_size(VOCAB)).embedding
        stages = rank_parameters(config, resolved.layout, embedding)
        planned = stages[parallel_state.get_pipeline_model_parallel_rank()]
        return tuple(counts.values()), (planned.dense, planned.expert, planned.copied)
    finally:
        destroy_groups()
