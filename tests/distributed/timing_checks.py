"""What ranks do in the tests of phases and traces: training with the loop itself, its parts slowed down."""

import time
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import BASE, VOCAB, merged
from tests.distributed.health_checks import Batches

STEPS = 4
SLEEP_S = 0.03


class SlowBatches(Batches):
    """Takes its time."""

    def next_step(self) -> list[Any]:
        time.sleep(SLEEP_S)
        return super().next_step()


def slow_down(trainer: Any) -> list[Any]:
    """Let routers, experts, shared experts and the optimizer sleep; return hooks to remove."""

    def sleep(*_: Any) -> None:
        time.sleep(SLEEP_S)

    modules = []
    for layer in trainer.model.moe_layers:
        modules += [layer.router, layer.experts, *([layer.shared_experts] if layer.use_shared_expert else [])]
    update = trainer.engine.deepspeed.step

    def slow_update(*arguments: Any, **keywords: Any) -> Any:
        sleep()
        return update(*arguments, **keywords)

    trainer.engine.deepspeed.step = slow_update
    return [module.register_forward_pre_hook(sleep) for module in modules]


def run_timed(changes: dict[str, Any], run_dir: str, slow: bool = False) -> dict[str, Any]:
    """Train a few steps; return the records, the loop's own seconds, and losses and norms bit for bit."""
    from adamoe_dist import platform
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups
    from adamoe_dist.training.callback import Callback
    from adamoe_dist.training.loop import Trainer
    from adamoe_dist.training.profiling import StepProfiler
    from adamoe_dist.training.recorder import Recorder
    from adamoe_dist.training.speed import ModelSpeed

    launch = Launch.from_environment()
    small = {"train": {"steps": STEPS}, "monitor": {"tensorboard": False}, "run": {"dir": run_dir}}
    config = config_from_dict(merged(merged(BASE, small), changes))
    resolved = resolve(config, launch.world_size)
    initialize_groups(launch, resolved)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    outcome: dict[str, Any] = {"records": {}, "seconds": {}, "numbers": []}

    class Last(Callback):
        def after_step(self, trainer: Any, result: Any) -> None:
            if recorder.last_record.get("step") == result.step:
                outcome["records"][result.step] = recorder.last_record
            outcome["seconds"][result.step] = result.seconds
            outcome["numbers"].append(f"{result.lm_loss!r} {result.grad_norm!r}")

    try:
        platform.seed_everything(1, deterministic=False)
        device = torch.device("cpu")
        model = build_model(config, resolved, VOCAB, torch.float32, cuda=False).model
        engine = TrainingEngine(model, config, resolved, torch.float32, config.moe.num_experts)
        speed = ModelSpeed.of(config, config.padded_vocab_size(VOCAB), resolved.world_size)
        recorder = Recorder([], speed)
        callbacks = [recorder, Last()]
        if config.monitor.profile.steps:
            callbacks.insert(0, StepProfiler(config.monitor.profile, Path(run_dir) / "profile"))
        batches: Any = (SlowBatches if slow else Batches)(config, resolved)
        trainer = Trainer(config, resolved, engine, model, batches, launch.rank, device, torch.float32, callbacks)
        hooks = slow_down(trainer) if slow else []
        trainer.run()
        for hook in hooks:
            hook.remove()
        engine.close()
        outcome["layers"], outcome["micro_batches"] = len(model.moe_layers), resolved.micro_batches_per_rank
        return outcome
    finally:
        destroy_groups()
