"""What a run will hold and compute, from its configuration alone."""

from dataclasses import dataclass

from adamoe_dist.config import Config, Resolved


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts of a model.

    ``dense`` weights are on every rank; ``expert`` weights (all layers, all true experts) are spread over the
    expert-parallel ranks.
    """

    dense: int
    expert: int
    embedding: int
    one_expert: int
    moe_layers: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.dense + self.expert

    def active(self, true_experts_per_token: float) -> int:
        """Weights that an average token uses."""
        return self.dense + round(self.moe_layers * true_experts_per_token * self.one_expert)


def count_parameters(config: Config, padded_vocab_size: int) -> Parameters:
    """Count the weights of the model that :func:`adamoe_dist.model.build_model` builds."""
    model, moe = config.model, config.moe
    width, heads = model.hidden_size, model.num_attention_heads
    groups = model.num_query_groups or heads
    attention = width * width * 2 + 2 * width * (width // heads) * groups
    moe_layers = model.num_layers // moe.layer_frequency
    null_rows = 1 if moe.num_null_experts and moe.router.null_init == "shared" else moe.num_null_experts
    router = (moe.num_experts + null_rows) * width + 3 * width * moe.null_types.constant
    gating_residual = (moe_layers - 1) * (moe.num_experts + moe.num_null_experts) ** 2
    shared = 3 * width * (moe.shared_expert_hidden_size or 0)
    feed_forward = 3 * width * (model.ffn_hidden_size or 4 * width)
    embedding = padded_vocab_size * width
    one_expert = 3 * width * moe.expert_hidden_size
    return Parameters(
        dense=embedding * (1 if model.tie_embeddings else 2)
        + model.num_layers * (attention + 2 * width)
        + moe_layers * (router + shared)
        + (gating_residual if moe.router.gating_residual else 0)
        + (model.num_layers - moe_layers) * feed_forward
        + width,
        expert=moe_layers * moe.num_experts * one_expert,
        embedding=embedding,
        one_expert=one_expert,
        moe_layers=moe_layers,
    )


def expected_load(config: Config) -> float:
    """Return the true experts a token that the run is laid out for: :attr:`MoEConfig.expected_load`."""
    return config.moe.expected_load


def flops_per_token(config: Config, parameters: Parameters, true_experts_per_token: float) -> float:
    """Return floating-point operations of training on one token: forward and backward, 3 x the forward.

    A multiply-add counts 2. The embedding look-up counts nothing, the output layer does; attention scores and values
    count the causal half.
    """
    products = parameters.active(true_experts_per_token)
    if not config.model.tie_embeddings:
        products -= parameters.embedding
    attention = 2 * config.model.num_layers * config.model.sequence_length * config.model.hidden_size
    return 3.0 * (2 * products + attention)


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
    """Return the bytes of training state on one rank.

    Weights are held in the compute precision, whole but in stage 3. Stages 0 and 1 keep the whole gradient in fp32
    (stage 1 in bf16 the last micro-batch's bf16 gradient besides), stages 2 and 3 this rank's shard of it. fp32 masters
    and AdamW's two moments are sharded from stage 1 on, and in CPU memory with a gradient of their size if offloaded.
    In fp32 the weights of stage 0 are their own masters.
    """
    stage, local_expert = config.zero.stage, parameters.expert / resolved.expert_parallel
    local = parameters.dense + local_expert
    shard = parameters.dense / resolved.data_parallel + local_expert / resolved.expert_data_parallel
    weight_bytes = 4 if precision == "fp32" else 2
    has_low_gradient = stage == 1 and precision == "bf16" and not config.zero.offload_optimizer
    masters = 0 if stage == 0 and precision == "fp32" else 4
    moments = 8 if config.optimizer.type == "adamw" else 0
    state = (local if stage == 0 else shard) * (masters + moments)
    is_offloaded = config.zero.offload_optimizer
    return RankMemory(
        weights=(shard if stage == 3 else local) * weight_bytes,
        gradients=shard * 4 if stage >= 2 else local * (6 if has_low_gradient else 4),
        optimizer=0.0 if is_offloaded else state,
        host=state + shard * 4 if is_offloaded else 0.0,
    )


def describe_run(config: Config, resolved: Resolved, padded_vocab_size: int, precision: str) -> list[str]:
    """Return the arithmetic of a run, one fact a line, as ``--dry-run`` and the start-up report show it."""
    parameters, load = count_parameters(config, padded_vocab_size), expected_load(config)
    memory = rank_memory(config, resolved, parameters, precision)
    train, moe = config.train, config.moe
    load_is = "at balance" if moe.router.target_load is None else "held (moe.router.target_load)"
    return [
        f"ranks: {resolved.layout.explain()}; ZeRO stage {config.zero.stage}, {precision}",
        f"batch: {train.global_batch_size} samples = {resolved.micro_batch_size} a micro-batch x "
        f"{resolved.micro_batches_per_rank} accumulated x {resolved.data_parallel} data-parallel ranks; "
        f"{resolved.tokens_per_step} tokens a step, {resolved.tokens_per_step * train.steps} in {train.steps} steps",
        f"experts: {moe.num_experts} true + {moe.num_null_experts} null, top_k={moe.top_k}: "
        f"{load:.2f} true experts a token {load_is}, {moe.num_experts // resolved.expert_parallel} a rank, in "
        f"{parameters.moe_layers} of {config.model.num_layers} layers",
        f"parameters: {parameters.total:,} total, {parameters.active(load):,} active a token at that load "
        f"(vocabulary {padded_vocab_size})",
        f"training state a rank: {memory.total / 2**30:.3f} GiB = weights {memory.weights / 2**30:.3f} + gradients "
        f"{memory.gradients / 2**30:.3f} + optimizer {memory.optimizer / 2**30:.3f} (activations not counted)"
        + (f"; in CPU memory {memory.host / 2**30:.3f} GiB" if memory.host else ""),
        f"compute: {flops_per_token(config, parameters, load) / 1e6:.2f} MFLOP a token, forward and backward",
    ]
