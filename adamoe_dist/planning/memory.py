"""Bytes of a rank from the configuration alone: training state, and what comes and goes in a step."""

from dataclasses import dataclass

from adamoe_dist.config import Config, Resolved, bucket_sizes
from adamoe_dist.planning.activations import KeptPerToken, kept_per_token, tokens_of_a_rank
from adamoe_dist.planning.compute import computed_load
from adamoe_dist.planning.parameters import Parameters, RankParameters, rank_parameters, stage_layers


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank's training state, activations and buffers of communication left out.

    ``host`` is what an offloaded optimizer keeps in CPU memory; the others are on the rank's device.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    host: float = 0.0

    @property
    def optimizer(self) -> float:
        """fp32 masters and moments on the device."""
        return self.masters + self.moments

    @property
    def total(self) -> float:
        """What is on the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes of a rank at the peak of a step, by part.

    Attributes:
        state: weights, gradients, masters and moments.
        buckets: what DeepSpeed reduces and gathers through, and stage 3's gathered weights.
        activations: kept for the backward pass, of all micro-batches in flight.
        scores: the output layer's, again, while their gradient is made.
        passing: what a layer's backward pass holds at once: gradients of its experts before they are added, rows on
            their way, and what recomputation brings back.
    """

    state: RankMemory
    buckets: float
    activations: float
    scores: float
    passing: float

    @property
    def total(self) -> float:
        """The peak on the device: scores are gone when the layers' backward passes come."""
        return self.state.total + self.buckets + self.activations + max(self.scores, self.passing)

    def table_parts(self, overhead: float) -> dict[str, float]:
        """Return the bytes by part, in few parts that add up, with ``overhead`` bytes of the driver."""
        return {
            "weights": self.state.weights,
            "gradients": self.state.gradients,
            "optimizer": self.state.optimizer,
            "buffers": self.buckets,
            "activations": self.activations,
            "in passing": max(self.scores, self.passing),
            "overhead": overhead,
        }

    def parts(self) -> dict[str, float]:
        """Return the bytes by part; of ``scores`` and ``passing`` the larger counts."""
        state = self.state
        return {
            "weights": state.weights,
            "gradients": state.gradients,
            "masters": state.masters,
            "moments": state.moments,
            "buckets": self.buckets,
            "activations": self.activations,
            "scores' gradient": self.scores,
            "layer's gradients and rows": self.passing,
        }


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


def peak_memory(
    config: Config,
    resolved: Resolved,
    parameters: Parameters,
    padded_vocab_size: int,
    precision: str,
    load: float,
    row_traffic: float,
    is_cpu: bool,
) -> PeakMemory:
    """Return the peak of a rank of the pipeline stage that needs most.

    Args:
        config: the tree.
        resolved: its arithmetic.
        parameters: of the model.
        padded_vocab_size: rows of the embedding.
        precision: of the model.
        load: true experts a token.
        row_traffic: bytes that a rank sends, or keeps, in one layer's dispatch.
        is_cpu: whether ranks are on CPU cores.
    """
    computed = computed_load(config, load)
    kept = kept_per_token(config, resolved, padded_vocab_size, precision, computed, is_cpu)
    stages = rank_parameters(config, resolved.layout, parameters.embedding)
    peaks = []
    for stage, local in enumerate(stages):
        state = _stage_memory(config, resolved, local, precision)
        buckets = _buckets(config, resolved, local, precision)
        activations, scores = _stage_activations(config, resolved, kept, stage)
        passing = _passing(config, resolved, kept, precision, stage) + 2 * row_traffic
        peaks.append(PeakMemory(state=state, buckets=buckets, activations=activations, scores=scores, passing=passing))
    return max(peaks, key=lambda peak: peak.total)


def _stage_memory(config: Config, resolved: Resolved, parameters: RankParameters, precision: str) -> RankMemory:
    stage = config.zero.stage
    local = parameters.dense + parameters.expert
    shard = _shard(parameters, resolved)
    weight_bytes = 4 if precision == "fp32" else 2
    has_low_gradient = stage == 1 and precision == "bf16" and not config.zero.offload_optimizer
    held = local if stage == 0 else shard
    masters = 0.0 if stage == 0 and precision == "fp32" else held * 4
    moments = held * 8 if config.optimizer.type == "adamw" else 0.0
    gradients = shard * 4 if stage >= 2 else local * (6 if has_low_gradient else 4)
    returned = 0 if stage == 3 else weight_bytes
    is_offloaded = config.zero.offload_optimizer
    return RankMemory(
        weights=((shard if stage == 3 else local) + parameters.copied) * weight_bytes,
        gradients=gradients + parameters.copied * 4,
        masters=0.0 if is_offloaded else masters,
        moments=0.0 if is_offloaded else moments,
        host=masters + moments + shard * (4 + returned) if is_offloaded else 0.0,
    )


def _shard(parameters: RankParameters, resolved: Resolved) -> float:
    return parameters.dense / resolved.layout.replicas + parameters.expert / resolved.layout.expert_data


def _buckets(config: Config, resolved: Resolved, parameters: RankParameters, precision: str) -> float:
    """Return the reduction buffer, and what stages 2 and 3 hold besides.

    Stage 2 reduces each further micro-batch's shard into a buffer of its own; stage 3 has its live weights gathered.
    """
    stage, weight_bytes = config.zero.stage, 4 if precision == "fp32" else 2
    sizes = bucket_sizes(int(parameters.dense + parameters.expert))
    sizes.update({k: v for k, v in config.zero.deepspeed.get("zero_optimization", {}).items() if k in sizes})
    found = 4.0 * sizes["reduce_bucket_size"]
    if stage == 2 and resolved.micro_batches_per_rank > 1:
        found += 4.0 * _shard(parameters, resolved)
    if stage == 3:
        largest = _largest_expert_weight(config, resolved) * 1.5
        found += weight_bytes * max(sizes["stage3_max_live_parameters"], largest)
    return found


def _stage_activations(config: Config, resolved: Resolved, kept: KeptPerToken, stage: int) -> tuple[float, float]:
    """Return what a stage keeps of all micro-batches in flight, and the scores' gradient."""
    stages, tokens = resolved.layout.pipeline, tokens_of_a_rank(config, resolved)
    moe, others = stage_layers(config, resolved.layout, stage)
    in_flight = min(stages - stage, resolved.micro_batches_per_rank)
    layers = moe * kept.moe_layer + others * kept.dense_layer
    is_last = stage == stages - 1
    activations = in_flight * tokens * layers + (tokens * kept.output if is_last else 0.0)
    return activations, tokens * kept.scores if is_last else 0.0


def _passing(config: Config, resolved: Resolved, kept: KeptPerToken, precision: str, stage: int) -> float:
    """Return what one layer's backward pass holds: what was recomputed, and the gradient of its largest weight."""
    tokens, weight_bytes = tokens_of_a_rank(config, resolved), 4 if precision == "fp32" else 2
    moe, _ = stage_layers(config, resolved.layout, stage)
    again = kept.whole_moe_layer - kept.moe_layer if moe else kept.whole_dense_layer - kept.dense_layer
    return again * tokens + (weight_bytes * _largest_expert_weight(config, resolved) if moe else 0.0)


def _largest_expert_weight(config: Config, resolved: Resolved) -> float:
    """Elements of a rank's stack of gate and up projections."""
    layout, moe = resolved.layout, config.moe
    cut = layout.expert * layout.expert_tensor
    return moe.num_experts * 2.0 * config.model.hidden_size * moe.expert_hidden_size / cut
