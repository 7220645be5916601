"""Whole fp32 weights and moments in and out of ZeRO's flat shards."""

from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from adamoe_dist.model import canonical_buffers, parts_of
from adamoe_dist.parallel import TrainingEngine

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTS = {"AdamW": ADAM_MOMENTS, "FusedAdam": ADAM_MOMENTS, "SGD": ()}
_LINKED, _LINK = "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"


class ZeroState:
    """What an engine's ZeRO-1, ZeRO-2 or BF16 optimizer holds, as whole tensors.

    All ranks call the methods together and in the same order: a weight is summed over the ranks that shard it.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        """Look into an engine; moments that its first step would create are created here, as zeros."""
        zero: Any = engine.deepspeed.optimizer
        for attribute in ("optimizer", "update_lp_params", _LINKED, _LINK):
            assert hasattr(zero, attribute), (
                f"{type(zero).__name__} of DeepSpeed {deepspeed.__version__} has no {attribute}"
            )
        self.zero = zero
        self.inner: torch.optim.Optimizer = zero.optimizer
        optimizer_class = type(self.inner).__name__
        assert optimizer_class in MOMENTS, f"the state of {optimizer_class} is not known"
        self.moments = MOMENTS[optimizer_class]
        self.parts = parts_of(engine.model)
        self.parameters = {name: part.parameter for name, part in self.parts.items()}
        self.buffers = canonical_buffers(engine.model)
        self._create_states()

    def weight(self, name: str) -> Tensor:
        """Return the master weight of a parameter: fp32, its shape, on its device."""
        value = safe_get_full_fp32_param(self.parameters[name])
        assert value is not None, f"DeepSpeed {deepspeed.__version__} has no master weight of {name}"
        return value

    def moment(self, name: str, moment: str) -> Tensor:
        """Return one of ``moments`` of a parameter: fp32, its shape, on its device."""
        value = safe_get_full_optimizer_state(self.parameters[name], moment)
        assert value is not None, f"DeepSpeed {deepspeed.__version__} has no {moment} of {name}"
        return value

    def set_weight(self, name: str, value: Tensor) -> None:
        """Set a master weight (fp32, the parameter's shape, any device); :meth:`update_weights` follows the last."""
        safe_set_full_fp32_param(self.parameters[name], value)

    def set_moment(self, name: str, moment: str, value: Tensor) -> None:
        """Set one of ``moments`` of a parameter (fp32, the parameter's shape, any device)."""
        safe_set_full_optimizer_state(self.parameters[name], value, moment)

    def update_weights(self) -> None:
        """Make the weights that the model computes with from the master weights."""
        self.zero.update_lp_params()

    @property
    def step(self) -> int:
        """How many updates the moments have seen."""
        steps = {int(self._step_holder(group)["step"]) for group in self.inner.param_groups}
        assert len(steps) == 1, f"groups of the optimizer have seen different numbers of steps: {sorted(steps)}"
        return steps.pop()

    @step.setter
    def step(self, value: int) -> None:
        for group in self.inner.param_groups:
            self._step_holder(group)["step"] = self._step_value(group, value)

    def _create_states(self) -> None:
        """Create missing moments and tell DeepSpeed of those of all groups.

        ZeRO links the moments of all groups after the first group's first update, when the others have none.
        """
        for group in self.inner.param_groups:
            (shard,) = group["params"]
            for moment in self.moments:
                self.inner.state[shard].setdefault(moment, torch.zeros_like(shard, requires_grad=False))
            if self.moments:
                self._step_holder(group).setdefault("step", self._step_value(group, 0))
        setattr(self.zero, _LINKED, False)
        getattr(self.zero, _LINK)()

    def _step_holder(self, group: dict[str, Any]) -> dict[str, Any]:
        """Where the number of steps is: torch keeps it with the moments, apex with the group."""
        if isinstance(self.inner, torch.optim.Adam):
            holder: dict[str, Any] = self.inner.state[group["params"][0]]
            return holder
        return group

    def _step_value(self, group: dict[str, Any], value: int) -> Tensor | int:
        if not isinstance(self.inner, torch.optim.Adam):
            return value
        on_device = group["fused"] or group["capturable"]
        return torch.tensor(float(value), device=group["params"][0].device if on_device else "cpu")
