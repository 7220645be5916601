"""The time of a step, by phase: what is computed, what travels, what of it is hidden behind the other."""

from dataclasses import dataclass

from adamoe_dist.config import Config, Resolved
from adamoe_dist.planning.activations import kept_per_token, tokens_of_a_rank
from adamoe_dist.planning.compute import LayerFlops, computed_load, layer_flops, output_flops
from adamoe_dist.planning.hardware import Assumptions, Cluster
from adamoe_dist.planning.memory import RankMemory
from adamoe_dist.planning.parameters import Parameters, RankParameters, rank_parameters, stage_layers
from adamoe_dist.planning.placement import Groups
from adamoe_dist.planning.rows import DispatchRows
from adamoe_dist.planning.traffic import (
    DispatchTime,
    Links,
    ZeroTime,
    context_time,
    dispatch_time,
    tensor_time,
    zero_time,
)

HIDDEN = (
    "the shared expert with the rows on their way there (moe.dispatcher.overlap_shared_expert)",
    "stage 3's collectives, and in stage 2 reductions with zero.deepspeed's overlap_comm, with computing (overlap)",
    "nothing else",
)
"""What this project overlaps, and so what the prediction does."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by phase; exchanges as far as they are not hidden."""

    dense: float
    experts: float
    dispatch: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    zero: float
    update: float
    hidden: float
    """Seconds of exchanges that are hidden; not part of the step."""

    def parts(self) -> dict[str, float]:
        """Return the phases that add up to the step."""
        return {
            "dense compute": self.dense,
            "experts": self.experts,
            "expert all-to-all": self.dispatch,
            "tensor collectives": self.tensor,
            "context exchange": self.context,
            "pipeline messages": self.pipeline,
            "pipeline bubble": self.bubble,
            "ZeRO collectives": self.zero,
            "optimizer update": self.update,
        }

    @property
    def total(self) -> float:
        """The step."""
        return sum(self.parts().values())

    @property
    def bottleneck(self) -> str:
        """The largest phase."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step's time follows from, gathered once."""

    config: Config
    resolved: Resolved
    parameters: Parameters
    padded_vocab_size: int
    precision: str
    load: float
    cluster: Cluster
    assumptions: Assumptions
    groups: Groups
    rows: DispatchRows

    @property
    def links(self) -> Links:
        """The rates of the links."""
        return Links.of(self.cluster, self.assumptions)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in the compute precision."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """Seconds of one micro-batch on one stage, forward and backward."""

    dense: float
    experts: float
    dispatch: float
    tensor: float
    context: float
    zero: float
    hidden: float

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.dispatch + self.tensor + self.context + self.zero


def step_time(setting: Setting, state: RankMemory) -> StepTime:
    """Predict a step: the slowest pipeline stage decides, and the bubble is (stages - 1) of its micro-batches."""
    locals_ = rank_parameters(setting.config, setting.resolved.layout, setting.parameters.embedding)
    zeros = [
        zero_time(setting.config, local, setting.links, setting.groups, setting.element_bytes) for local in locals_
    ]
    batches = [_micro_batch(setting, stage, zero) for stage, zero in enumerate(zeros)]
    slowest = max(range(len(batches)), key=lambda stage: batches[stage].total)
    batch, count = batches[slowest], setting.resolved.micro_batches_per_rank
    stages = setting.resolved.layout.pipeline
    tokens = tokens_of_a_rank(setting.config, setting.resolved)
    message = tokens * setting.config.model.hidden_size * setting.element_bytes
    return StepTime(
        dense=count * batch.dense,
        experts=count * batch.experts,
        dispatch=count * batch.dispatch,
        tensor=count * batch.tensor,
        context=count * batch.context,
        pipeline=2 * setting.links.relay(message, setting.groups.pipeline, count + 1),
        bubble=(stages - 1) * batch.total,
        zero=count * batch.zero + zeros[slowest].per_step,
        update=_update(setting, state, locals_[slowest]),
        hidden=count * batch.hidden,
    )


def _micro_batch(setting: Setting, stage: int, zero: ZeroTime) -> _MicroBatch:
    config, layout = setting.config, setting.resolved.layout
    moe, others = stage_layers(config, layout, stage)
    load = computed_load(config, setting.load)
    with_experts, without = layer_flops(config, True, load), layer_flops(config, False, load)
    dense = moe * _dense_layer(setting, with_experts) + others * _dense_layer(setting, without)
    dense += _element_wise(setting, moe, others)
    if stage == layout.pipeline - 1:
        rate = _rate(setting, setting.assumptions.matmul_efficiency)
        dense += 3 * _tokens(setting) * output_flops(config, setting.padded_vocab_size) / rate
    experts = moe * _expert_layer(setting, with_experts)
    links, groups, size = setting.links, setting.groups, setting.element_bytes
    sent = dispatch_time(setting.rows, links, setting.assumptions.expert_imbalance)
    dispatch, hidden = _exposed_dispatch(setting, sent, with_experts)
    has_shared = bool(config.moe.shared_expert_hidden_size)
    tensor = moe * tensor_time(config, setting.resolved, links, groups, size, has_shared)
    tensor += others * tensor_time(config, setting.resolved, links, groups, size, True)
    context = (moe + others) * context_time(config, setting.resolved, links, groups, size)
    reduced, covered = _exposed_zero(config, zero, setting.assumptions.overlap * (dense + experts))
    return _MicroBatch(
        dense=dense,
        experts=experts,
        dispatch=moe * dispatch,
        tensor=tensor,
        context=context,
        zero=reduced,
        hidden=moe * hidden + covered,
    )


def _tokens(setting: Setting) -> float:
    return tokens_of_a_rank(setting.config, setting.resolved)


def _rate(setting: Setting, efficiency: float) -> float:
    return setting.cluster.device.peak_flops(setting.precision) * efficiency


def _dense_layer(setting: Setting, flops: LayerFlops) -> float:
    """Seconds of a layer's work outside of true experts: forward, backward (twice that), and what is recomputed."""
    assumptions, recompute = setting.assumptions, setting.config.train.recompute
    fast, slow = _rate(setting, assumptions.matmul_efficiency), _rate(setting, assumptions.attention_efficiency)
    feed_forward = flops.feed_forward / fast
    rest = (flops.projections + flops.router) / fast + flops.attention / slow
    passes = 4 if recompute == "full" else 3
    time = passes * rest + (3 if recompute == "none" else 4) * feed_forward
    return _tokens(setting) * time + passes * 1e-6 * assumptions.layer_overhead_us


def _expert_layer(setting: Setting, flops: LayerFlops) -> float:
    """Seconds of a layer's true experts on the fullest rank."""
    assumptions = setting.assumptions
    passes = 3 if setting.config.train.recompute == "none" else 4
    rate = _rate(setting, assumptions.expert_efficiency)
    return passes * _tokens(setting) * flops.experts * assumptions.expert_imbalance / rate


def _element_wise(setting: Setting, moe: int, others: int) -> float:
    """Seconds of what is bound by memory: kept activations, moved ``activation_moves`` times."""
    is_cpu, load = setting.cluster.device.is_cpu, computed_load(setting.config, setting.load)
    kept = kept_per_token(setting.config, setting.resolved, setting.padded_vocab_size, setting.precision, load, is_cpu)
    size = _tokens(setting) * (moe * kept.whole_moe_layer + others * kept.whole_dense_layer)
    return setting.assumptions.activation_moves * size / _memory_rate(setting)


def _memory_rate(setting: Setting) -> float:
    return 1e9 * setting.cluster.device.memory_gb_s * setting.assumptions.memory_efficiency


def _exposed_dispatch(setting: Setting, sent: DispatchTime, flops: LayerFlops) -> tuple[float, float]:
    """Return a layer's exchanges that nothing hides, and what the shared expert hides, forward and backward."""
    config = setting.config
    forward_passes = 2 if config.train.recompute == "full" else 1
    total = forward_passes * (sent.bits + sent.there + sent.back) + sent.there + sent.back
    overlaps = config.moe.dispatcher.overlap_shared_expert and config.moe.dispatcher.type != "flex"
    if not overlaps or config.moe.router.type == "topk" or setting.resolved.layout.expert == 1:
        return total, 0.0
    shared = _tokens(setting) * flops.feed_forward / _rate(setting, setting.assumptions.matmul_efficiency)
    hidden = forward_passes * min(shared, sent.there) + min(2 * shared, sent.there)
    return total - hidden, hidden


def _exposed_zero(config: Config, zero: ZeroTime, cover: float) -> tuple[float, float]:
    """Return what ZeRO adds to a micro-batch, and what is hidden, of ``cover`` seconds of computing at most."""
    raw = config.zero.deepspeed.get("zero_optimization", {})
    overlaps = raw.get("overlap_comm", config.zero.stage == 3)
    total = zero.per_micro_batch + zero.gathers
    hidden = min(total, cover) if overlaps else 0.0
    return total - hidden, hidden


def _update(setting: Setting, state: RankMemory, local: RankParameters) -> float:
    """Seconds of the optimizer's step: its state and the gradients are read and written once."""
    layout, assumptions = setting.resolved.layout, setting.assumptions
    if not setting.config.zero.offload_optimizer:
        return (2 * state.optimizer + state.gradients + state.weights) / _memory_rate(setting)
    shard = local.dense / layout.replicas + local.expert / layout.expert_data
    moved = shard * (4 + setting.element_bytes) / (1e9 * assumptions.host_gb_s)
    return moved + 2 * state.host / (1e9 * assumptions.host_update_gb_s)
