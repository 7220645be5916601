"""The optimizer of ZeRO stage 0: every rank holds all of its model's masters, moments and gradients."""

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

from adamoe_dist.model import replica_of


class UnshardedOptimizer:
    """fp32 masters and gradients of a model in any precision, under DeepSpeed's engine.

    DeepSpeed's own stage 0 has one wrapper for each precision: their gradient norms are approximate where ranks hold
    different experts, and none accumulates in fp32 under bf16. This one takes each micro-batch's gradient into an fp32
    sum; the engine reduces those sums, experts over expert-data-parallel ranks; the norm counts every weight once.

    Attributes:
        optimizer: the inner optimizer; its groups hold the masters.
        parameter_groups: the model's parameters, as the inner optimizer's groups hold their masters.
        loss_scaler: DeepSpeed's, of scale 1 but for fp16.
        overflow: whether the last step was skipped because its gradient was not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, loss_scaler: Any, clipping: float) -> None:
        """Take over ``optimizer``, whose groups hold the model's parameters; ``clipping`` 0 turns clipping off."""
        self.optimizer = optimizer
        self.loss_scaler = loss_scaler
        self.overflow = False
        self.parameter_groups: list[list[torch.nn.Parameter]] = [list(group["params"]) for group in self.param_groups]
        self.parameters = [parameter for group in self.parameter_groups for parameter in group]
        self._clipping = clipping
        self._global_grad_norm = 0.0
        self._masters = {parameter: _master(parameter) for parameter in self.parameters}
        self._gradients: dict[torch.nn.Parameter, Tensor] = {}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self.parameters]
        for group, parameters in zip(self.param_groups, self.parameter_groups, strict=True):
            group["params"] = [self._masters[parameter] for parameter in parameters]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with before the backward pass."""
        return float(self.loss_scaler.loss_scale)

    def master(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return a parameter's fp32 master: itself where the model computes in fp32."""
        return self._masters[parameter]

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Make the weights that the model computes with from the masters."""
        for parameter, master in self._masters.items():
            if master is not parameter:
                parameter.copy_(master)

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return the sums that the engine is to reduce: dense ones, and experts' by their group's name."""
        dense: list[Tensor] = []
        experts: dict[str, list[Tensor]] = {}
        parameter: Any
        for parameter in self.parameters:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(self._masters[parameter], requires_grad=False)
            gradient = self._gradients[parameter]
            (experts.setdefault(parameter.group_name, []) if is_moe_param(parameter) else dense).append(gradient)
        return dense, experts

    @torch.no_grad()
    def step(self) -> None:
        """Clip the reduced gradients by their global norm and update; skip the step if they are not finite."""
        scale, scaled_norm = self.loss_scale, self._norm()
        self.overflow = not math.isfinite(scaled_norm)
        if self.loss_scaler.dynamic:
            self.loss_scaler.update_scale(self.overflow)
        if self.overflow:
            self._global_grad_norm = math.inf
            self.zero_grad()
            return
        self._global_grad_norm = scaled_norm / scale
        excess = (self._global_grad_norm + 1e-6) / self._clipping if self._clipping else 1.0
        divisor = scale * max(excess, 1.0)
        for parameter, master in self._masters.items():
            gradient = self._gradients.pop(parameter)
            master.grad = gradient if divisor == 1.0 else gradient.div_(divisor)
        self.optimizer.step()
        self.update_lp_params()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        assert set_to_none
        self._gradients.clear()
        for parameter, master in self._masters.items():
            parameter.grad = master.grad = None

    def destroy(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()
        self.zero_grad()

    def _take(self, parameter: Tensor) -> None:
        """Move a micro-batch's gradient into the sum."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None and isinstance(parameter, torch.nn.Parameter)
        if parameter in self._gradients:
            self._gradients[parameter].add_(gradient)
        else:
            self._gradients[parameter] = gradient.to(torch.float32)

    def _norm(self) -> float:
        """Return the norm over the whole model, the loss scale in it. Collective over all ranks."""
        device = self.parameters[0].device
        norms = [torch.linalg.vector_norm(self._gradients[p]) for p in self.parameters if replica_of(p)[0] == 0]
        squares = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
        squares = squares.to(device)
        dist.all_reduce(squares)
        return float(squares.sqrt())


def _master(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()
