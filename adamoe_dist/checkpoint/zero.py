"""Whole fp32 weights and moments in and out of the optimizers of all ZeRO stages."""

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from adamoe_dist.model import canonical_buffers, parts_of
from adamoe_dist.parallel import TrainingEngine, UnshardedOptimizer, is_trained, update_weights_of_stage_3

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTS = {"AdamW": ADAM_MOMENTS, "FusedAdam": ADAM_MOMENTS, "DeepSpeedCPUAdam": ADAM_MOMENTS, "SGD": ()}
_LINKED, _LINK = "_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"


class ZeroState:
    """What an engine holds in any ZeRO stage, as whole tensors: masters and moments of what the optimizer trains.

    A frozen weight has no master: its value is the one that the model computes with.

    All ranks call the methods together and in the same order: a weight is summed over the ranks that shard it.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        """Look into an engine; moments that its first step would create are created here, as zeros."""
        zero: Any = engine.deepspeed.optimizer
        self.zero = zero
        self.is_whole = isinstance(zero, UnshardedOptimizer)
        self.is_stage_3 = isinstance(zero, DeepSpeedZeroOptimizer_Stage3)
        if not self.is_whole and not self.is_stage_3:
            for attribute in ("optimizer", "update_lp_params", _LINKED, _LINK):
                assert hasattr(zero, attribute), (
                    f"{type(zero).__name__} of DeepSpeed {deepspeed.__version__} has no {attribute}"
                )
        self.inner: torch.optim.Optimizer = zero.optimizer
        optimizer_class = type(self.inner).__name__
        assert optimizer_class in MOMENTS, f"the state of {optimizer_class} is not known"
        self.moments = MOMENTS[optimizer_class]
        self.parts = parts_of(engine.model)
        self.parameters = {name: part.parameter for name, part in self.parts.items()}
        self.trained = {name: part for name, part in self.parts.items() if is_trained(part.parameter)}
        self.buffers = canonical_buffers(engine.model)
        self._create_states()

    def weight(self, name: str) -> Tensor:
        """Return the master weight of a parameter, or a frozen one's value: fp32, its shape, on its device."""
        if name not in self.trained:
            return self._frozen(name)
        if self.is_whole:
            master: Tensor = self.zero.master(self.parameters[name])
            return master.detach()
        value = safe_get_full_fp32_param(self.parameters[name])
        assert value is not None, f"DeepSpeed {deepspeed.__version__} has no master weight of {name}"
        return value

    def moment(self, name: str, moment: str) -> Tensor:
        """Return one of ``moments`` of a parameter: fp32, its shape, on its device."""
        if self.is_whole:
            return self._state_of_whole(name)[moment]
        value = safe_get_full_optimizer_state(self.parameters[name], moment)
        assert value is not None, f"DeepSpeed {deepspeed.__version__} has no {moment} of {name}"
        return value

    def set_weight(self, name: str, value: Tensor) -> None:
        """Set a master weight (fp32, the parameter's shape, any device); :meth:`update_weights` follows the last."""
        if name not in self.trained:
            self._set_frozen(name, value)
        elif self.is_whole:
            self.weight(name).copy_(value)
        elif self.is_stage_3:
            self.zero.set_local_hp_param(self._shard(name, value), self.parameters[name])
        else:
            safe_set_full_fp32_param(self.parameters[name], value)

    def set_moment(self, name: str, moment: str, value: Tensor) -> None:
        """Set one of ``moments`` of a parameter (fp32, the parameter's shape, any device)."""
        if self.is_whole:
            self._state_of_whole(name)[moment].copy_(value)
        elif self.is_stage_3:
            self.zero.set_local_hp_param(self._shard(name, value), self.parameters[name], moment)
        else:
            safe_set_full_optimizer_state(self.parameters[name], value, moment)

    def _frozen(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        if not self.is_stage_3:
            return parameter.detach().float()
        with GatheredParameters([parameter]):
            return parameter.detach().float().clone()

    @torch.no_grad()
    def _set_frozen(self, name: str, value: Tensor) -> None:
        parameter: Any = self.parameters[name]
        if self.is_stage_3:
            shard = parameter.ds_tensor
            shard.copy_(self._shard(name, value).view_as(shard))
        else:
            parameter.copy_(value)

    def update_weights(self) -> None:
        """Make the weights that the model computes with from the master weights."""
        if self.is_stage_3:
            update_weights_of_stage_3(self.zero)
        else:
            self.zero.update_lp_params()

    def _state_of_whole(self, name: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.inner.state[self.zero.master(self.parameters[name])]
        return state

    def _shard(self, name: str, value: Tensor) -> Tensor:
        """Return this rank's shard of a whole tensor, with the padding that stage 3 gives the last ones."""
        parameter: Any = self.parameters[name]
        size = parameter.ds_tensor.numel()
        flat = torch.zeros(size * parameter.ds_process_group.size(), dtype=value.dtype, device=value.device)
        flat[: value.numel()] = value.flatten()
        return flat.narrow(0, size * parameter.ds_process_group.rank(), size)

    @property
    def step(self) -> int:
        """How many updates the moments have seen."""
        steps = {int(self._step_holder(shard, group)["step"]) for shard, group in self._shards()}
        assert len(steps) == 1, f"groups of the optimizer have seen different numbers of steps: {sorted(steps)}"
        return steps.pop()

    @step.setter
    def step(self, value: int) -> None:
        for shard, group in self._shards():
            self._step_holder(shard, group)["step"] = self._step_value(shard, group, value)

    def _shards(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the tensors that the inner optimizer updates, each with its group."""
        groups = self.inner.param_groups
        if self.is_stage_3:
            flat = enumerate(self.zero.fp32_partitioned_groups_flat)
            return [(shard, groups[self.zero.sub_group_to_group_id[index]]) for index, shard in flat]
        return [(shard, group) for group in groups for shard in group["params"]]

    def _create_states(self) -> None:
        """Create missing moments and tell DeepSpeed of those of all groups.

        Stages 1 and 2 link the moments of all groups after the first group's first update, when the others have none.
        """
        for shard, group in self._shards():
            for moment in self.moments:
                self.inner.state[shard].setdefault(moment, torch.zeros_like(shard, requires_grad=False))
            if self.moments:
                self._step_holder(shard, group).setdefault("step", self._step_value(shard, group, 0))
        if hasattr(self.zero, _LINKED):
            setattr(self.zero, _LINKED, False)
            getattr(self.zero, _LINK)()

    def _step_holder(self, shard: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Where the number of steps is: apex keeps it with the group, the others with the moments."""
        if type(self.inner).__name__ == "FusedAdam":
            return group
        holder: dict[str, Any] = self.inner.state[shard]
        return holder

    def _step_value(self, shard: Tensor, group: dict[str, Any], value: int) -> Tensor | int:
        if not isinstance(self.inner, torch.optim.Adam):
            return value
        on_device = group["fused"] or group["capturable"]
        return torch.tensor(float(value), device=shard.device if on_device else "cpu")
