"""DeepSpeed's engine over Megatron's experts: ZeRO-1 and ZeRO-2, accumulation, clipping."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from adamoe_dist.config import Config, Resolved
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
        "train_batch_size": resolved.micro_batch_size * resolved.data_parallel,
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


def mark_experts(model: torch.nn.Module, expert_parallel: int) -> None:
    """Tell DeepSpeed which group reduces each expert; without expert parallelism experts are dense weights."""
    for parameter in model.parameters():
        if getattr(parameter, "is_expert", False) and expert_parallel > 1:
            parameter.group_name = expert_group_name(expert_parallel)  # type: ignore[attr-defined]


class TrainingEngine:
    """One model under ZeRO. The only place that scales losses.

    ``backward(loss, n)`` adds the gradient of ``loss / n``, and of the attached auxiliary losses over n; after n
    of them ``step()`` clips by the global norm and updates.
    """

    def __init__(
        self, model: torch.nn.Module, config: Config, resolved: Resolved, dtype: torch.dtype, num_experts: int
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
        mark_experts(model, resolved.expert_parallel)
        verify_marks(model, resolved.expert_parallel)
        before = checksum_experts(model)
        optimizer = build_optimizer(config, parameter_groups(model, config.optimizer.weight_decay))
        settings = deepspeed_config(config, resolved, dtype)
        expert_counts = (num_experts,) if resolved.expert_parallel > 1 else ()
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

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Add the gradient of one of ``micro_batches`` micro-batches of this rank."""
        scale = torch.tensor(1.0 / micro_batches, device=loss.device)
        MoEAuxLossAutoScaler.set_loss_scale(scale)
        self.deepspeed.backward(loss / micro_batches)

    def step(self) -> None:
        """Reduce, clip and update."""
        self.deepspeed.step()

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
