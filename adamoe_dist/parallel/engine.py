"""DeepSpeed's engine over Megatron's experts: ZeRO-1 and ZeRO-2, accumulation, clipping."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from adamoe_dist.config import Config, Layout, Resolved
from adamoe_dist.model import LanguageModel
from adamoe_dist.parallel.gradients import sum_over_tensor_ranks, tied_embedding
from adamoe_dist.parallel.groups import MegatronTopology, expert_group_name
from adamoe_dist.parallel.optimizer import build_optimizer, parameter_groups
from adamoe_dist.parallel.wiring import WiringError, checksum_experts, verify_marks, verify_wiring


class MegatronExpertEngine(DeepSpeedEngine):
    """A DeepSpeed engine that knows that its module has experts, though none is DeepSpeed's own MoE layer.

    Without this ZeRO would average experts over ranks that hold different ones.
    """

    expert_counts: tuple[int, ...] = ()

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        self.has_moe_layers = bool(self.expert_counts)
        self.num_experts = list(self.expert_counts)
        super()._configure_distributed_model(model)


def deepspeed_config(config: Config, resolved: Resolved, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's dictionary for a run: an output of the tree.

    Accumulation is the training loop's: the loss is divided there and each ``step()`` is a boundary, so DeepSpeed's own
    arithmetic sees one micro-batch a step. Gradients are accumulated and reduced in fp32. ZeRO's list of tested
    optimizers has no SGD; ZeRO shards any element-wise update correctly.
    """
    extra = dict(config.zero.deepspeed)
    zero = {"stage": config.zero.stage, "reduce_scatter": True, "contiguous_gradients": True}
    zero.update(extra.pop("zero_optimization", {}))
    return {
        "train_batch_size": resolved.micro_batch_size * resolved.layout.replicas,
        "train_micro_batch_size_per_gpu": resolved.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.train.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **extra,
    }


def mark_experts(model: torch.nn.Module, layout: Layout) -> None:
    """Tell DeepSpeed which group reduces each expert; where dense weights have the same group, experts are such."""
    for parameter in model.parameters():
        if getattr(parameter, "is_expert", False):
            parameter.allreduce = not layout.experts_are_apart  # type: ignore[attr-defined]
            if layout.experts_are_apart:
                parameter.group_name = expert_group_name(layout.expert)  # type: ignore[attr-defined]


class TrainingEngine:
    """One model under ZeRO. The only place that scales losses.

    ``backward(loss, n)`` adds the gradient of ``loss / n``, and of the attached auxiliary losses over n; after n
    of them ``step()`` clips by the global norm and updates.
    """

    def __init__(
        self, model: LanguageModel, config: Config, resolved: Resolved, dtype: torch.dtype, num_experts: int
    ) -> None:
        """Wrap ``model`` (on the CPU, fp32) and check the wiring.

        Args:
            model: the module whose forward DeepSpeed is to wrap.
            config: the tree.
            resolved: its arithmetic.
            dtype: the compute dtype.
            num_experts: true experts a layer.

        Raises:
            WiringError: DeepSpeed would reduce some weight over the wrong ranks.
        """
        mark_experts(model, resolved.layout)
        verify_marks(model, resolved.layout)
        before = checksum_experts(model)
        sum_over_tensor_ranks(model)
        self._tied = tied_embedding(model, config.model.tie_embeddings)
        optimizer = build_optimizer(config, parameter_groups(model, config.optimizer.weight_decay))
        settings = deepspeed_config(config, resolved, dtype)
        expert_counts = (num_experts,) if resolved.layout.experts_are_apart else ()
        self.deepspeed = _initialize(model, optimizer, settings, expert_counts)
        self.model = model
        try:
            verify_wiring(self.deepspeed, model, resolved, before)
        except WiringError:
            self.close()
            raise

    def __call__(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Run the model's forward under DeepSpeed's hooks."""
        output: Tensor = self.deepspeed(*inputs, **keywords)
        return output

    def train(self) -> None:
        """Switch to training."""
        self.deepspeed.train()

    def eval(self) -> None:
        """Switch to evaluation; not between the micro-batches of a step."""
        self.deepspeed.eval()

    def start_step(self, micro_batches: int) -> None:
        """Say how many micro-batches make the step: auxiliary losses are scaled by it in every stage of a pipeline."""
        device = next(self.model.parameters()).device
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0 / micro_batches, device=device))
        if self._tied is not None:
            self._tied.start_step(micro_batches)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Add the gradient of one of ``micro_batches`` micro-batches of this rank."""
        scale = torch.tensor(1.0 / micro_batches, device=loss.device)
        MoEAuxLossAutoScaler.set_loss_scale(scale)
        self._forget_last_backward()
        self.deepspeed.backward(loss / micro_batches)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Add the gradient that ``gradient``, that of ``output``, gives: a pipeline stage's backward pass."""
        self._forget_last_backward()
        self.deepspeed.backward(_Seeded.apply(output, gradient))

    def _forget_last_backward(self) -> None:
        """Let DeepSpeed take a backward pass that follows another without a forward pass between them for a new one.

        It would drop the gradients of all but the first in ZeRO-2 and with fp32 accumulation of bf16 gradients.
        """
        clear = getattr(self.deepspeed.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            clear()

    def step(self) -> None:
        """Reduce, clip and update."""
        self.deepspeed.step()
        if self._tied is not None:
            self._tied.finish_step()

    def share_tied_embedding(self) -> None:
        """Bring a weight that was set from outside to its copy, where a pipeline has one."""
        if self._tied is not None:
            self._tied.share()

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks would keep it, and its groups, for the life of the process."""
        self.deepspeed.destroy()

    def gradient_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping."""
        return float(self.deepspeed.get_global_grad_norm())

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of every group for the next step."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate


class _Seeded(torch.autograd.Function):
    """A 0-d tensor whose backward pass starts ``output``'s with a given gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


def _initialize(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    expert_counts: tuple[int, ...],
) -> DeepSpeedEngine:
    """Build DeepSpeed's engine as the subclass; ``deepspeed.initialize`` looks the class up by this name."""
    original = deepspeed.DeepSpeedEngine
    engine_class = type("BoundExpertEngine", (MegatronExpertEngine,), {"expert_counts": expert_counts})
    deepspeed.DeepSpeedEngine = engine_class
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=MegatronTopology(), dist_init_required=False
        )
    finally:
        deepspeed.DeepSpeedEngine = original
    return engine
