"""What ranks do in the checkpoint tests: a small run that can be left and continued in another layout."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import BASE, DTYPES, VOCAB, Outcome, biases_of, gathered, merged, tokens_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is cut."""

    expert_parallel: int | str = 1
    stage: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        changes = {
            "parallel": {"expert": self.expert_parallel},
            "zero": {"stage": self.stage, "deepspeed": {"zero_allow_untested_optimizer": True}},
            "optimizer": {"type": self.optimizer},
        }
        return merged(merged(BASE, changes), self.changes)


class Run:
    """An engine and the steps it does."""

    def __init__(self, layout: Layout, seed: int) -> None:
        from adamoe_dist import platform
        from adamoe_dist.config import config_from_dict, resolve
        from adamoe_dist.model import build_model
        from adamoe_dist.parallel import Launch, Schedule, TrainingEngine, initialize_groups
        from adamoe_dist.training.load_control import load_controller

        self.launch = Launch.from_environment()
        self.config = config_from_dict(layout.tree())
        self.resolved = resolve(self.config, self.launch.world_size)
        initialize_groups(self.launch, self.resolved)
        platform.seed_everything(seed, deterministic=False)
        dtype = DTYPES[layout.precision]
        changed_seed = merged(layout.tree(), {"run": {"seed": seed}})
        model = build_model(config_from_dict(changed_seed), self.resolved, VOCAB, dtype, cuda=False).model
        self.engine = TrainingEngine(model, self.config, self.resolved, dtype, self.config.moe.num_experts)
        self.schedule = Schedule(self.engine, model, dtype, torch.device("cpu"))
        self.controller = load_controller(self.config, model)
        self.layout = {"world_size": self.launch.world_size, "expert": layout.expert_parallel, "zero": layout.stage}

    def advance(self, steps: range) -> Outcome:
        import torch.distributed as dist

        from adamoe_dist.parallel import data_parallel_rank

        outcome = Outcome()
        for step in steps:
            batch = tokens_of(step, self.config.train.global_batch_size, self.config.model.sequence_length)
            micro = batch.split(self.resolved.micro_batch_size)[data_parallel_rank() :: self.resolved.data_parallel]
            for layer in self.engine.model.moe_layers:
                layer.counters.reset()
            total = self.schedule.run(micro)
            self.engine.set_learning_rate(self.config.optimizer.learning_rate)
            self.engine.step()
            if self.controller is not None:
                self.controller.update(step)
            dist.all_reduce(total)
            outcome.losses.append(float(total) / self.resolved.layout.replicas / self.resolved.layout.tensor)
            outcome.norms.append(self.engine.gradient_norm())
        model = self.engine.model
        outcome.weights = gathered(model, dict(model.named_parameters()))
        outcome.biases = biases_of(model)
        return outcome

    def save(self, root: Path, step: int, keep_last: int | None = None) -> Path:
        from adamoe_dist.checkpoint import Retention, save_checkpoint

        state = {"step": step, "tokens_seen": 8 * 32 * step, "tokenizer_fingerprint": "abc"}
        return save_checkpoint(root, step, self.engine, state, self.config.to_dict(), self.layout, Retention(keep_last))


@contextlib.contextmanager
def started(layout: Layout, seed: int = 7) -> Iterator[Run]:
    from adamoe_dist.checkpoint import load
    from adamoe_dist.parallel import destroy_groups

    load._BATCH_BYTES = 50_000  # several batches, of stages not equally many
    try:
        run = Run(layout, seed)
        yield run
        run.engine.close()
    finally:
        destroy_groups()


def train_and_save(layout: Layout, root: Path, steps: int, more: int) -> Outcome:
    """Train, save, train on; the outcome of the second part."""
    with started(layout) as run:
        run.advance(range(steps))
        run.save(root, steps)
        return run.advance(range(steps, steps + more))


def resume(layout: Layout, path: Path, more: int, again: Path | None = None) -> tuple[Outcome, dict[str, Any]]:
    """Load into an engine of other initial weights and train on; save what was loaded to ``again``."""
    from adamoe_dist.checkpoint import load_checkpoint

    with started(layout, seed=99) as run:
        state = load_checkpoint(path, run.engine)
        if again is not None:
            run.save(again, state["step"])
        return run.advance(range(state["step"], state["step"] + more)), state


def continue_and_save(layout: Layout, path: Path, root: Path, step: int) -> Outcome:
    """Load into an engine of other initial weights, train one step and save."""
    from adamoe_dist.checkpoint import load_checkpoint

    with started(layout, seed=99) as run:
        load_checkpoint(path, run.engine)
        outcome = run.advance(range(step, step + 1))
        run.save(root, step + 1)
        return outcome


def load_after_steps(layout: Layout, path: Path, more: int) -> Outcome:
    """Load into an engine that has done steps already."""
    from adamoe_dist.checkpoint import load_checkpoint

    with started(layout, seed=99) as run:
        run.advance(range(1))
        step = load_checkpoint(path, run.engine)["step"]
        return run.advance(range(step, step + more))


def fail_while_saving(layout: Layout, root: Path) -> str:
    """Save step 1; fail on rank 1 while saving step 2; return what each rank raised. Then save step 3."""
    with started(layout) as run:
        run.advance(range(1))
        run.save(root, 1)
        synchronize = os.fsync
        if run.launch.rank == 1:
            os.fsync = refuse
        try:
            run.save(root, 2)
            raised = "nothing"
        except Exception as problem:
            raised = f"{type(problem).__name__}: {problem}"
        finally:
            os.fsync = synchronize
        if run.launch.rank == 0:
            assert (root / "latest_checkpointed_iteration.txt").read_text() == "1"
            assert not list(root.glob("iter_0000002*"))
        torch.distributed.barrier()
        run.save(root, 3, keep_last=1)
        return raised


def refuse(_: int) -> None:
    raise OSError(28, "No space left on device")


def logits_after_training(layout: Layout, root: Path) -> torch.Tensor:
    """Train, save, and return the logits of some tokens."""
    with started(layout) as run:
        run.advance(range(2))
        run.save(root, 2)
        with torch.no_grad():
            return run.engine.model.logits(tokens_of(50, 2, 16))


def logits_of_loaded_weights(layout: Layout, path: Path) -> tuple[torch.Tensor, int, list[float]]:
    """Take weights only; the logits, and the steps and largest moments of the optimizer."""
    from adamoe_dist.checkpoint import load_weights
    from adamoe_dist.checkpoint.zero import ZeroState

    with started(layout, seed=99) as run:
        load_weights(path, run.engine)
        zero = ZeroState(run.engine)
        moments = [float(zero.moment(name, "exp_avg").abs().max()) for name in zero.parameters]
        with torch.no_grad():
            return run.engine.model.logits(tokens_of(50, 2, 16)), zero.step, moments


def refused_load(layout: Layout, path: Path, weights_only: bool = False) -> str:
    """Load what cannot be loaded and return the message."""
    from adamoe_dist.checkpoint import load_checkpoint, load_weights
    from adamoe_dist.errors import UserError

    with started(layout) as run:
        try:
            (load_weights if weights_only else load_checkpoint)(path, run.engine)
        except UserError as problem:
            return str(problem)
    return "accepted"
