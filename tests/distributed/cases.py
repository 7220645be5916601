"""Small runs that layouts are compared on: what every rank does, given plain arguments."""

from dataclasses import dataclass, field
from typing import Any

import torch

VOCAB = 96
BASE = {
    "run": {"seed": 7},
    "model": {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "sequence_length": 32},
    "moe": {
        "num_experts": 8,
        "num_null_experts": 8,
        "top_k": 3,
        "expert_hidden_size": 48,
        "router": {"z_loss_coefficient": 1e-3, "balance": {"coefficient": 0.02}},
    },
    "data": {"tokenizer": "unused", "train": [{"path": "unused"}]},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "gradient_clipping": 0.5},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return result


@dataclass
class Outcome:
    """What a run gave: per step losses (nats) and gradient norms; first gradients and last weights by global name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    first_micro_batch: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Per layer, of this rank's first micro-batch: tokens by load, tokens of each true expert."""
    balance_losses: list[float] = field(default_factory=list)
    """Per step, mean over layers and micro-batches."""
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    """The selection biases on this rank at the end, by name."""


def tokens_of(step: int, global_batch: int, length: int) -> torch.Tensor:
    """(global batch, length + 1) ids of a step; skewed, so that experts are unevenly loaded."""
    generator = torch.Generator().manual_seed(100 + step)
    uniform = torch.rand(global_batch, length + 1, generator=generator)
    return (uniform.square() * VOCAB).long().clamp(max=VOCAB - 1)


def padding_of(tokens: torch.Tensor) -> torch.Tensor:
    """(B, S) of tokens (B, S + 1): true after a length that the sample's own tokens decide."""
    length = tokens.shape[1] - 1
    real = 2 + tokens.sum(dim=1) % (length - 2)
    return torch.arange(length, device=tokens.device) >= real.unsqueeze(1)


def loss_mask_of(tokens: torch.Tensor) -> torch.Tensor:
    """(B, S) of tokens (B, S + 1): real tokens after a prompt whose length the sample decides; of some samples none."""
    length = tokens.shape[1] - 1
    prompt = tokens[:, 1:4].sum(dim=1) % (length // 2)
    is_prompt = torch.arange(length, device=tokens.device) < prompt.unsqueeze(1)
    has_loss = tokens.sum(dim=1, keepdim=True) % 3 > 0
    return ~padding_of(tokens) & ~is_prompt & has_loss


def batch_of(tokens: torch.Tensor, padded: bool = False, masked: bool = False) -> Any:
    from adamoe_dist.data import MicroBatch

    padding = padding_of(tokens) if padded or masked else None
    return MicroBatch(tokens, loss_mask_of(tokens) if masked else None, padding)


def gathered(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the parts of every weight over all ranks, so that every layout has the same names and shapes.

    ``values`` are by local name, each in the shape of the local weight. What is returned is in CPU memory.
    """
    import torch.distributed as dist

    from adamoe_dist.model import parts_of

    parts, device = parts_of(model), device_of(model)
    local_names = {id(parameter): name for name, parameter in model.named_parameters()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: part.shape for name, part in parts.items()})
    shapes = {name: shape for held in everyone for name, shape in held.items()}
    result = {}
    values = {name: unsharded(value) for name, value in values.items()}
    for name, shape in shapes.items():
        whole = torch.zeros(shape, device=device)
        part = parts.get(name)
        if part is not None and part.replica == 0:
            part.place(values[local_names[id(part.parameter)]].detach().float(), whole)
        dist.all_reduce(whole)
        result[name] = whole.cpu()
    return result


def device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def add_noise(model: torch.nn.Module, relative: float) -> None:
    """Add random numbers of a norm relative to its own to every gradient, as rounding would; not to exact zeros."""
    generator = torch.Generator().manual_seed(17)

    def noisy(gradient: torch.Tensor) -> torch.Tensor:
        numbers = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        return gradient + numbers * (gradient != 0) * (relative * gradient.norm() / gradient.numel() ** 0.5)

    for parameter in model.parameters():
        parameter.register_hook(noisy)


def require_equal_replicas(model: torch.nn.Module) -> None:
    """Ranks that hold the same part of a weight hold the same bits."""
    import hashlib

    import torch.distributed as dist

    from adamoe_dist.model import is_tied_copy, part_of, parts_of

    parts = list(parts_of(model).values())
    copies = [parameter for parameter in model.parameters() if is_tied_copy(parameter)]
    parts += [part_of("embedding.word_embeddings.weight", parameter) for parameter in copies]
    held = {
        (part.name, str(part.pieces)): hashlib.sha256(
            unsharded(part.parameter).detach().float().cpu().numpy().tobytes()
        ).hexdigest()
        for part in parts
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    first: dict[Any, str] = {}
    for rank, other in enumerate(everyone):
        for part, digest in other.items():
            assert first.setdefault(part, digest) == digest, f"rank {rank} has other bits of {part}"


def unsharded(value: torch.Tensor) -> torch.Tensor:
    """A copy of a weight, which under ZeRO-3 is sharded; of any other tensor, itself."""
    from deepspeed.runtime.zero import GatheredParameters

    if not hasattr(value, "ds_shape"):
        return value
    with GatheredParameters([value]):
        return value.detach().clone()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    changes: dict[str, Any],
    steps: int,
    degrees: int | dict[str, int],
    precision: str = "fp32",
    force: str | None = None,
    padded: bool = False,
    noise: float = 0.0,
    masked: bool = False,
) -> Outcome:
    """Train a small model on this rank's part of each global batch; all ranks call it together.

    ``degrees`` are those of the section ``parallel``, or the expert-parallel degree alone. ``force`` bends the router:
    ``starve`` leaves expert 0 without rows in the first micro-batch, ``all_null`` sends every token of it to null
    experts only. ``padded`` marks the ends of samples as padding, of some more than of others;
    ``masked`` does that too and takes the loss of some tokens only, of some micro-batches none. ``noise`` adds
    random numbers of that norm, relative to its own, to each gradient that a micro-batch gives.
    """
    import torch.distributed as dist

    from adamoe_dist import platform
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model, choose_trained
    from adamoe_dist.parallel import (
        Launch,
        Schedule,
        TrainingEngine,
        data_parallel_rank,
        destroy_groups,
        initialize_groups,
    )
    from adamoe_dist.training.load_control import load_controller

    launch = Launch.from_environment()
    degrees = {"expert": degrees} if isinstance(degrees, int) else degrees
    config = config_from_dict(merged(merged(BASE, changes), {"parallel": degrees}))
    resolved = resolve(config, launch.world_size)
    layout = resolved.layout
    initialize_groups(launch, resolved)
    try:
        platform.seed_everything(config.run.seed, deterministic=False)
        dtype, device = DTYPES[precision], platform.device(launch.local_rank)
        built = build_model(config, resolved, VOCAB, dtype, cuda=platform.is_cuda())
        require_equal_replicas(built.model)  # before a broadcast of the engine's could hide a difference
        choose_trained(built.model, config)
        engine = TrainingEngine(built.model, config, resolved, dtype, config.moe.num_experts)
        schedule = Schedule(engine, built.model, dtype, device)
        outcome = Outcome(initial=gathered(built.model, dict(built.model.named_parameters())))
        if noise:
            add_noise(built.model, noise)
        watch = Watch(built.model, force, data_parallel_rank(), layout.data)
        controller = load_controller(config, built.model)
        for step in range(steps):
            batch = tokens_of(step, config.train.global_batch_size, config.model.sequence_length).to(device)
            micro = batch.split(resolved.micro_batch_size)[data_parallel_rank() :: layout.data]
            assert len(micro) == resolved.micro_batches_per_rank
            for layer in built.model.moe_layers:
                layer.counters.reset()
            capture = GradientCapture(built.model) if step == 0 else None
            watch.start_step()
            total = schedule.run([batch_of(tokens, padded, masked) for tokens in micro])
            if capture:
                outcome.first_micro_batch = watch.first_micro_batch
                outcome.gradients = gathered(built.model, capture.reduced(layout))
            engine.set_learning_rate(config.optimizer.learning_rate)
            engine.step()
            dist.all_reduce(total)
            outcome.losses.append(float(total) / (layout.replicas * layout.tensor))
            outcome.norms.append(engine.gradient_norm())
            outcome.balance_losses.append(mean_balance_loss(built.model, layout.tensor))
            if controller is not None:
                controller.update(step)
        require_equal_replicas(built.model)
        outcome.weights = gathered(built.model, dict(built.model.named_parameters()))
        outcome.biases = biases_of(built.model)
        engine.close()
        return outcome
    finally:
        destroy_groups()


def biases_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The selection biases of this rank, where there are any."""
    from adamoe_dist.model import canonical_buffers

    return {
        name: buffer.clone().cpu() for name, buffer in canonical_buffers(model).items() if name.endswith("expert_bias")
    }


def counted(layer: Any) -> tuple[dict[str, float], tuple[list[int], list[int]]]:
    """A layer's sums so far, and its tokens by load and by expert."""
    from adamoe_dist.routing import read_vector

    sums, statistics = read_vector(layer.counters.vector(device_of(layer)), layer.counters.num_experts)
    return sums, (statistics.tokens_by_load_L.tolist(), statistics.expert_counts_E.tolist())


def mean_balance_loss(model: Any, tensor: int) -> float:
    """Mean over micro-batches and layers of what was counted in this step; tensor-parallel ranks add up to one."""
    import torch.distributed as dist

    total = torch.zeros(2, dtype=torch.float64, device=device_of(model))
    for layer in model.moe_layers:
        sums = counted(layer)[0]
        total += total.new_tensor([sums["balance_loss"], sums["micro_batches"]])
    dist.all_reduce(total)
    return float(total[0] / total[1]) * tensor


class GradientCapture:
    """Sums each parameter's local gradient over the micro-batches, before ZeRO takes it away."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.sums = {
            name: torch.zeros(getattr(p, "ds_shape", p.shape), device=p.device) for name, p in model.named_parameters()
        }
        self.handles = []
        for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
            self.handles.append(parameter.register_hook(self._adder(name)))

    def _adder(self, name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            self.sums[name] += gradient.detach().float()

        return add

    def reduced(self, layout: Any) -> dict[str, torch.Tensor]:
        """The mean over data-parallel ranks, by torch.distributed itself: what ZeRO must arrive at."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        from adamoe_dist.parallel import replicas_group

        for handle in self.handles:
            handle.remove()
        for name, parameter in self.model.named_parameters():
            is_apart = getattr(parameter, "is_expert", False) and layout.experts_are_apart
            group = parallel_state.get_expert_data_parallel_group() if is_apart else replicas_group()
            dist.all_reduce(self.sums[name], group=group)
            self.sums[name] /= layout.replicas
        return self.sums


class Watch:
    """Follows the micro-batches through the model: bends the router in the first of all, reads the first's counts."""

    def __init__(self, model: Any, force: str | None, rank: int, ranks: int) -> None:
        self.model, self.rank, self.ranks = model, rank, ranks
        self.forward_passes = 0
        self.first_micro_batch: list[tuple[list[int], list[int]]] = []
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)
        for layer in model.moe_layers if force else []:
            layer.router.gating = self._bent(layer.router.gating, str(force), layer.config.moe.num_experts)

    def start_step(self) -> None:
        self.forward_passes = 0

    def _before(self, *_: Any) -> None:
        self.forward_passes += 1

    def _after(self, *_: Any) -> None:
        if not self.first_micro_batch:
            self.first_micro_batch = [counted(layer)[1] for layer in self.model.moe_layers]

    def _bent(self, original: Any, force: str, num_experts: int) -> Any:
        def gating(hidden: torch.Tensor) -> torch.Tensor:
            scores = original(hidden)
            if self.forward_passes == 1 and self.rank == 0:
                shift = torch.zeros_like(scores)
                if force == "starve":
                    shift[:, 0] = -1e4
                else:
                    shift[:, num_experts:] = 1e2
                scores = scores + shift
            return scores

        return gating
