"""What ranks do in the checkpoint tests: a small run that can be left and continued in another layout."""

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
        from adamoe_dist.model import build_model, choose_trained
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
        choose_trained(model, self.config)
        self.engine = TrainingEngine(model, self.config, self.resolved, dtype, self.config.moe.num_experts)
        self.schedule = Schedule(self.engine, model, dtype, torch.device("cpu"))
        self.controller = load_controller(self.config, model)
        self.layout = {"world_size": self.launch.world_size, "expert": layout.expert_parallel, "zero": layout.stage}

    def advance(self, steps: range, batches: Callable[[int], list[Any]] | None = None) -> Outcome:
        import torch.distributed as dist

        from adamoe_dist.data import MicroBatch
        from adamoe_dist.parallel import data_parallel_rank

        outcome = Outcome()
        for step in steps:
            if batches is not None:
                micro = batches(step)
            else:
                batch = tokens_of(step, self.config.train.global_batch_size, self.config.model.sequence_length)
                parts = batch.split(self.resolved.micro_batch_size)
                micro = [MicroBatch(part) for part in parts[data_parallel_rank() :: self.resolved.data_parallel]]
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

    def save(self, root: Path, step: int, keep_last: int | None = None, **more: Any) -> Path:
        from adamoe_dist.checkpoint import Retention, save_checkpoint

        state = {"step": step, "tokens_seen": 8 * 32 * step, "tokenizer_fingerprint": "abc", **more}
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


def bytes_to_write(layout: Layout) -> tuple[int, dict[str, int]]:
    """What this rank writes of weights and moments, and the whole tensors' sizes over all ranks."""
    from adamoe_dist.checkpoint import take_snapshot
    from adamoe_dist.checkpoint.agreement import gathered

    with started(layout) as run:
        tensors = take_snapshot(0, run.engine, {}, {}, {}).tensors
        mine = [part for part in tensors.values() if part.key.startswith(("model.", "optimizer.exp"))]
        sizes = {part.key: 4 * torch.Size(part.global_shape).numel() for part in mine}
        whole = {key: size for other in gathered(sizes) for key, size in other.items()}
        return sum(part.data.nbytes for part in mine if part.data is not None), whole


def batches_of_a_load(layout: Layout, path: Path) -> list[int]:
    """For each batch of a load, how many of the tensors of the one before are still there when it begins."""
    from adamoe_dist.checkpoint import load_checkpoint, tensors

    still_there, before, original = [], [], tensors.read_tensors

    def read(*arguments: Any) -> dict[str, torch.Tensor]:
        still_there.append(sum(tensor() is not None for tensor in before))
        loaded = original(*arguments)
        before[:] = [weakref.ref(tensor) for tensor in loaded.values()]
        return loaded

    with started(layout) as run:
        tensors.read_tensors = read
        try:
            load_checkpoint(path, run.engine)
        finally:
            tensors.read_tensors = original
        return still_there


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


class Numbered:
    """Samples of which each is told by its tokens: sample i is the same on every rank and in every layout."""

    sequence_length = BASE["model"]["sequence_length"]

    def __getitem__(self, index: int) -> np.ndarray:
        sample = tokens_of(10_000 + index, 1, self.sequence_length)[0].numpy()
        sample[0], sample[1] = index // VOCAB, index % VOCAB
        return sample

    def identity(self) -> dict[str, Any]:
        part = {"prefix": "numbered", "fingerprint": "0" * 64, "seed": 1, "weight": "1"}
        return {"seed": 1, "sequence_length": self.sequence_length, "datasets": [part]}


def train_on_stream(
    layout: Layout, root: Path, steps: range, source: Path | None = None, save_after: int | None = None
) -> tuple[list[list[int]], Outcome]:
    """Train on the samples that the training loop would use; the numbers of this rank's by step, and the outcome."""
    from adamoe_dist.checkpoint import load_checkpoint
    from adamoe_dist.data import BatchStream
    from adamoe_dist.parallel import data_parallel_rank

    with started(layout, seed=7 if source is None else 99) as run:
        resolved, train = run.resolved, run.config.train
        stream = BatchStream(
            Numbered(), train.global_batch_size, resolved.micro_batch_size, data_parallel_rank(), resolved.data_parallel
        )
        if source is not None:
            stream.load_state_dict(load_checkpoint(source, run.engine)["data"])
        seen: list[list[int]] = []

        def next_batch(_: int) -> list[Any]:
            micro = stream.next_step()
            assert all(len(batch.tokens) == resolved.micro_batch_size for batch in micro)
            seen.append([int(row[0]) * VOCAB + int(row[1]) for batch in micro for row in batch.tokens])
            return micro

        outcome = Outcome()
        for step in steps:
            part = run.advance(range(step, step + 1), next_batch)
            outcome.losses += part.losses
            outcome.norms += part.norms
            outcome.weights, outcome.biases = part.weights, part.biases
            if step + 1 == save_after:
                run.save(root, step + 1, data=stream.state_dict())
        return seen, outcome


def tensors_of(layout: Layout, path: Path) -> dict[str, torch.Tensor]:
    """The weights and second moments of a checkpoint by their names in it, through an engine of one process."""
    from adamoe_dist.checkpoint import load_checkpoint
    from adamoe_dist.checkpoint.zero import ZeroState

    with started(layout, seed=99) as run:
        load_checkpoint(path, run.engine)
        zero = ZeroState(run.engine)
        weights = {f"model.{name}": zero.weight(name).detach().clone() for name in zero.parts}
        return weights | {
            f"optimizer.exp_avg_sq.{name}": zero.moment(name, "exp_avg_sq").clone() for name in zero.parts
        }


def read_by_megatron(path: Path, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of a checkpoint, whole and this rank's half of its rows, by Megatron-core's own public loader."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    with started(Layout()):
        (size, *inner) = dist_checkpointing.load_tensors_metadata(str(path))[key].global_shape
        whole = ShardedTensor.from_rank_offsets(key, torch.empty(size, *inner), replica_id=dist.get_rank())
        half = ShardedTensor.from_rank_offsets(key, torch.empty(size // 2, *inner), (0, 1 - dist.get_rank(), 2))
        read = [dist_checkpointing.load({"wanted": wanted}, str(path))["wanted"] for wanted in (whole, half)]
        return read[0], read[1]


def generators_go_on(layout: Layout, root: Path) -> tuple[list[float], list[float]]:
    """Numbers that this rank's generators give after a save, and again after loading it."""
    import random

    from adamoe_dist.checkpoint import load_checkpoint

    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    with started(layout) as run:
        random.seed(run.launch.rank)
        np.random.seed(run.launch.rank)
        torch.manual_seed(run.launch.rank)
        draws()
        path = run.save(root, 1)
        expected = draws()
        random.seed(50)
        np.random.seed(50)
        torch.manual_seed(50)
        load_checkpoint(path, run.engine)
        return expected, draws()


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
