"""Bytes of training state on a rank, from the configuration alone."""

from dataclasses import dataclass

from adamoe_dist.config import Config, Resolved
from adamoe_dist.planning.parameters import Parameters, RankParameters, rank_parameters


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank's training state, activations and buffers of communication left out.

    ``host`` is what an offloaded optimizer keeps in CPU memory; the others are on the rank's device.
    """

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """What is on the device."""
        return self.weights + self.gradients + self.optimizer


def rank_memory(config: Config, resolved: Resolved, parameters: Parameters, precision: str) -> RankMemory:
    """Return the bytes of training state on a rank of the pipeline stage that holds most.

    Weights are held in the compute precision, whole but in stage 3. Stages 0 and 1 keep the whole gradient in fp32
    (stage 1 in bf16 the last micro-batch's bf16 gradient besides), stages 2 and 3 this rank's shard of it. fp32 masters
    and AdamW's two moments are sharded from stage 1 on, and in CPU memory if offloaded, where DeepSpeed keeps an fp32
    gradient of the shard and, in stages 1 and 2, a copy of the weights that are to be sent back besides.
    In fp32 the weights of stage 0 are their own masters. A copied embedding has an fp32 gradient, and no state.
    """
    stages = rank_parameters(config, resolved.layout, parameters.embedding)
    return max(
        (_stage_memory(config, resolved, local, precision) for local in stages),
        key=lambda memory: memory.total + memory.host,
    )


def _stage_memory(config: Config, resolved: Resolved, parameters: RankParameters, precision: str) -> RankMemory:
    stage, layout = config.zero.stage, resolved.layout
    local = parameters.dense + parameters.expert
    shard = parameters.dense / layout.replicas + parameters.expert / layout.expert_data
    weight_bytes = 4 if precision == "fp32" else 2
    has_low_gradient = stage == 1 and precision == "bf16" and not config.zero.offload_optimizer
    masters = 0 if stage == 0 and precision == "fp32" else 4
    moments = 8 if config.optimizer.type == "adamw" else 0
    state = (local if stage == 0 else shard) * (masters + moments)
    gradients = shard * 4 if stage >= 2 else local * (6 if has_low_gradient else 4)
    returned = 0 if stage == 3 else weight_bytes
    is_offloaded = config.zero.offload_optimizer
    return RankMemory(
        weights=((shard if stage == 3 else local) + parameters.copied) * weight_bytes,
        gradients=gradients + parameters.copied * 4,
        optimizer=0.0 if is_offloaded else state,
        host=state + shard * (4 + returned) if is_offloaded else 0.0,
    )
