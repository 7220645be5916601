"""What ranks do in the tests of bad steps: training with the loop itself, one step of which is spoiled on one rank."""

import hashlib
import math
from typing import Any

import torch

from tests.distributed.cases import BASE, DTYPES, VOCAB, merged, tokens_of

BAD_STEP = 2
"""Of five, from 0: Adam has moments by then."""


class Batches:
    """This rank's samples of the steps, as the loop asks for them."""

    def __init__(self, config: Any, resolved: Any) -> None:
        self.consumed_samples = 0
        self.config, self.resolved = config, resolved

    def next_step(self) -> list[Any]:
        from adamoe_dist.data import MicroBatch
        from adamoe_dist.parallel import data_parallel_rank

        size = self.config.train.global_batch_size
        tokens = tokens_of(self.consumed_samples // size, size, self.config.model.sequence_length)
        self.consumed_samples += size
        parts = tokens.split(self.resolved.micro_batch_size)[data_parallel_rank() :: self.resolved.layout.data]
        return [MicroBatch(part) for part in parts]

    def describe(self, first_sample: int) -> str:
        return f"the samples from {first_sample}"


def spoil(trainer: Any, kind: str, bad_steps: range) -> list[Any]:
    """Spoil steps on the last rank, or, with ``kind`` left_out, have none of them; return hooks to remove."""
    from adamoe_dist.training.callback import StepResult, TokenCounts

    if kind == "left_out":
        original = trainer._train_step

        def without() -> Any:
            if trainer.step not in bad_steps:
                return original()
            trainer.batches.next_step()
            trainer.step += 1
            return StepResult(trainer.step, math.nan, math.nan, 0.0, 0.0, 0, TokenCounts(0, 0))

        trainer._train_step = without
        return []
    hooks: list[Any] = []
    if trainer.rank == torch.distributed.get_world_size() - 1:
        if kind == "gradient":
            weight = [p for name, p in trainer.model.named_parameters() if "layers" in name][-1]
            hooks.append(weight.register_hook(lambda g: g * math.nan if trainer.step in bad_steps else g))
        else:
            change = {"nan_loss": lambda o: o * math.nan, "inf_loss": lambda o: o + math.inf}[kind]
            hook = lambda _, __, o: change(o) if trainer.step in bad_steps else o  # noqa: E731
            hooks.append(trainer.model.register_forward_hook(hook))
    return hooks


def run_spoiled(changes: dict[str, Any], precision: str, kind: str, bad_steps: range) -> dict[str, Any]:
    """Train five steps, some of them spoiled; return what ended it and digests of all that the engine holds."""
    from adamoe_dist import platform
    from adamoe_dist.checkpoint.zero import ZeroState
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.errors import NumericalError
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups
    from adamoe_dist.training.callback import Callback
    from adamoe_dist.training.loop import Trainer

    launch = Launch.from_environment()
    config = config_from_dict(merged(merged(BASE, {"train": {"steps": 5}, "parallel": {"expert": 2}}), changes))
    resolved = resolve(config, launch.world_size)
    initialize_groups(launch, resolved)
    losses: list[str] = []

    class Losses(Callback):
        def after_step(self, trainer: Any, result: Any) -> None:
            losses.append(f"{result.step} {result.lm_loss} {result.grad_norm} {result.learning_rate}")

    try:
        platform.seed_everything(1, deterministic=False)
        dtype, device = DTYPES[precision], torch.device("cpu")
        model = build_model(config, resolved, VOCAB, dtype, cuda=False).model
        engine = TrainingEngine(model, config, resolved, dtype, config.moe.num_experts)
        batches: Any = Batches(config, resolved)
        trainer = Trainer(config, resolved, engine, model, batches, launch.rank, device, dtype, [Losses()])
        hooks = spoil(trainer, kind, bad_steps)
        stop = ""
        try:
            trainer.run()
        except NumericalError as error:
            stop = str(error)
        zero = ZeroState(engine)
        held = {f"weight {name}": zero.weight(name) for name in zero.parts}
        for moment in zero.moments:
            held |= {f"{moment} {name}": zero.moment(name, moment) for name in zero.parts}
        held |= {f"buffer {name}": value for name, value in zero.buffers.items()}
        held |= {f"local {name}": getattr(p, "ds_tensor", p.data) for name, p in model.named_parameters()}
        digests = {name: hashlib.sha256(v.detach().float().numpy().tobytes()).hexdigest() for name, v in held.items()}
        finite = all(bool(value.isfinite().all()) for value in held.values())
        outcome = {"stop": stop, "digests": digests, "updates": zero.step, "finite": finite, "losses": losses}
        outcome |= {"events": dict(trainer.events), "step": trainer.step, "consumed": batches.consumed_samples}
        outcome |= {"scale": engine.loss_scale, "skipped": engine.skipped_steps}
        for hook in hooks:
            hook.remove()
        engine.close()
        return outcome
    finally:
        destroy_groups()


def run_spoiled_in_fp16(*arguments: Any) -> dict[str, Any]:
    """The same in fp16, on a CPU."""
    from unittest import mock

    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        return run_spoiled(*arguments)
