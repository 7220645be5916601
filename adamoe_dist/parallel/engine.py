"""DeepSpeed's engine over Megatron's experts: ZeRO stages 0 to 3, accumulation, loss scales, clipping."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from adamoe_dist.config import Config, Layout, Resolved, bucket_sizes
from adamoe_dist.model import LanguageModel
from adamoe_dist.parallel.buckets import trained_elements
from adamoe_dist.parallel.gradients import sum_over_tensor_ranks, tied_embedding
from adamoe_dist.parallel.groups import MegatronTopology, expert_group_name
from adamoe_dist.parallel.health import discarding, forget_gradients
from adamoe_dist.parallel.optimizer import build_optimizer, choose_implementation, parameter_groups
from adamoe_dist.parallel.stage3 import forget_model
from adamoe_dist.parallel.unsharded import UnshardedOptimizer
from adamoe_dist.parallel.wiring import WiringError, checksum_experts, verify_marks, verify_wiring

DYNAMIC_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler changes from step to step."""


class MegatronExpertEngine(DeepSpeedEngine):
    """A DeepSpeed engine that knows that its module has experts, though none is DeepSpeed's own MoE layer.

    Without this ZeRO would average experts over ranks that hold different ones. Stage 0 has this project's optimizer.
    """

    expert_counts: tuple[int, ...] = ()

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        self.has_moe_layers = bool(self.expert_counts)
        self.num_experts = list(self.expert_counts)
        super()._configure_distributed_model(model)

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        if not self.zero_optimization_partition_weights():  # stage 3 shards frozen experts too
            trains_experts = any(group.get("moe", False) for group in client_optimizer.param_groups)
            self.has_moe_layers = self.has_moe_layers and trains_experts  # the others insist on a group of experts
        if self.zero_optimization():
            super()._configure_optimizer(client_optimizer, model_parameters)
            return
        self.basic_optimizer = client_optimizer
        dtype, arguments = self.get_data_types()[0], self.dynamic_loss_scale_args()
        scaler = CreateLossScaler(dtype, self.loss_scale(), self.dynamic_loss_scale(), arguments)
        self.optimizer = UnshardedOptimizer(client_optimizer, scaler, self.gradient_clipping())

    def clip_fp32_gradients(self) -> None:
        """Do nothing: the optimizer of stage 0 clips, by the exact norm."""

    def backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """Run the backward pass of a scaled loss; DeepSpeed scales for its own optimizers only."""
        if isinstance(self.optimizer, UnshardedOptimizer):
            loss = loss * self.optimizer.loss_scale
        return super().backward(loss, *arguments, **keywords)

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Reduce in buckets of ``reduce_bucket_size``; stage 0 and bf16 in stage 1 would copy all gradients at once."""
        super().allreduce_gradients(bucket_size or self.zero_reduce_bucket_size())

    def _validate_zero3_moe_compatibility(self) -> None:
        """Accept: experts carry the marks by which stage 3 shards DeepSpeed's own, and ``verify_wiring`` checks."""


def deepspeed_config(config: Config, resolved: Resolved, dtype: torch.dtype, elements: int) -> dict[str, Any]:
    """Return DeepSpeed's dictionary for a run, an output of the tree; ``elements`` are those that this rank trains.

    Accumulation is the training loop's: the loss is divided there and each ``step()`` is a boundary, so DeepSpeed's own
    arithmetic sees one micro-batch a step. Gradients are accumulated and reduced in fp32. ZeRO's list of tested
    optimizers has no SGD; ZeRO shards any element-wise update correctly.
    """
    extra = dict(config.zero.deepspeed)
    zero: dict[str, Any] = {"stage": config.zero.stage, "reduce_scatter": True, "contiguous_gradients": True}
    zero.update(bucket_sizes(elements))
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero.update(extra.pop("zero_optimization", {}))
    return {
        "train_batch_size": resolved.micro_batch_size * resolved.layout.replicas,
        "train_micro_batch_size_per_gpu": resolved.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.train.gradient_clipping,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        **extra,
    }


def mark_experts(model: torch.nn.Module, layout: Layout) -> None:
    """Tell DeepSpeed which group reduces each expert; where dense weights have the same group, experts are such."""
    for parameter in model.parameters():
        if getattr(parameter, "is_expert", False):
            parameter.allreduce = not layout.experts_are_apart  # type: ignore[attr-defined]
            if layout.experts_are_apart:
                name = expert_group_name(layout.expert)
                parameter.group_name = name  # type: ignore[attr-defined]
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]


class TrainingEngine:
    """One model under ZeRO. The only place that scales losses.

    After ``start_step(n)``, ``backward(loss)`` adds the gradient of ``loss / n``, and of the attached auxiliary losses
    over n, or as ``weigh_auxiliary_losses`` says; after n of them ``step()`` clips by the global norm and updates.
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
        implementation, _ = choose_implementation(config)
        optimizer = build_optimizer(config, parameter_groups(model, config.optimizer.weight_decay), implementation)
        settings = deepspeed_config(config, resolved, dtype, trained_elements(model))
        expert_counts = (num_experts,) if resolved.layout.experts_are_apart else ()
        self.deepspeed = _initialize(model, optimizer, settings, expert_counts)
        self.model = model
        self.is_scaled = dtype == torch.float16
        if self.is_scaled:
            self.deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False
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
        """Say how many micro-batches of this rank make the step; losses and auxiliary losses are divided by it."""
        self._micro_batches = micro_batches
        self._set_auxiliary_scale(micro_batches)
        if self._tied is not None:
            self._tied.start_step(micro_batches)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch of the step that :meth:`start_step` started."""
        self._backward(loss / self._micro_batches)

    def backward_from(self, output: Tensor, gradient: Tensor) -> None:
        """Add the gradient that arrives at ``output``, which is no loss; :meth:`start_step` came before.

        Args:
            output: what the model computed, of any shape.
            gradient: with respect to it; divided by the micro-batches and scaled already, it is taken as it is.
        """
        self._backward(_Seeded.apply(output, gradient))

    def _backward(self, scalar: Tensor) -> None:
        """Run one backward pass.

        DeepSpeed closes a micro-batch's accounts when the next forward begins. A schedule may run two backward passes
        in a row; without the call below stage 3 loses gradients of the first, without a message.
        """
        clear = getattr(self.deepspeed.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            clear()
        self.deepspeed.backward(scalar)

    def weigh_auxiliary_losses(self, factor: Tensor) -> None:
        """Let those of the micro-batch whose forward or backward pass comes next weigh otherwise than the mean has it.

        Args:
            factor: 0-d; 1 is as :meth:`start_step` left it.
        """
        MoEAuxLossAutoScaler.set_loss_scale(factor * (self.loss_scale / self._micro_batches))
        for layer in self.model.moe_layers:
            layer.counters.loss_weight = factor

    def _set_auxiliary_scale(self, micro_batches: int) -> None:
        device = next(self.model.parameters()).device
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(self.loss_scale / micro_batches, device=device))

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with before the backward pass: 1 but for fp16."""
        return float(self.deepspeed.optimizer.loss_scaler.loss_scale) if self.is_scaled else 1.0

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because the fp16 gradient overflowed."""
        return int(self.deepspeed.skipped_steps) if self.is_scaled else 0

    def loss_scale_state(self) -> dict[str, float] | None:
        """Return where the dynamic loss scale of fp16 is, plain numbers, the same on every rank; else None."""
        if not self.is_scaled:
            return None
        scaler = self.deepspeed.optimizer.loss_scaler
        return {**{name: getattr(scaler, name) for name in DYNAMIC_SCALE}, "skipped_steps": self.skipped_steps}

    def load_loss_scale_state(self, state: dict[str, float] | None) -> None:
        """Go on where :meth:`loss_scale_state` was.

        After another precision fp16 starts with its first scale, and no other precision has a scale.
        """
        if not self.is_scaled or state is None:
            return
        scaler = self.deepspeed.optimizer.loss_scaler
        for name in DYNAMIC_SCALE:
            setattr(scaler, name, state[name])
        self.deepspeed.skipped_steps = int(state["skipped_steps"])

    @property
    def is_skipped(self) -> bool:
        """Whether the last step was."""
        return bool(self.is_scaled and self.deepspeed.optimizer.overflow)

    def step(self, discard: bool = False) -> None:
        """Reduce, clip and update; drop the gradients instead where their norm is not finite.

        Args:
            discard: drop them whatever their norm, as if the step had never begun; the same on all ranks.
        """
        if discard:
            with discarding(self.deepspeed.optimizer, next(self.model.parameters()).device):
                self.deepspeed.step()
            self.deepspeed.skipped_steps -= 1
        else:
            self.deepspeed.step()
        forget_gradients(self.deepspeed.optimizer)
        if self._tied is not None:
            self._tied.finish_step()

    def share_tied_embedding(self) -> None:
        """Bring a weight that was set from outside to its copy, where a pipeline has one."""
        if self._tied is not None:
            self._tied.share()

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks would keep it, and its groups, for the life of the process."""
        self.deepspeed.destroy()
        forget_model(self.model)

    def gradient_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping; infinite where nothing was updated."""
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
