"""What a run will hold and compute, from its configuration alone."""

from adamoe_dist.config import Config, Resolved
from adamoe_dist.planning.memory import rank_memory
from adamoe_dist.planning.parameters import Parameters, count_parameters, expected_load


def flops_per_token(config: Config, parameters: Parameters, true_experts_per_token: float) -> float:
    """Return floating-point operations of training on one token: forward and backward, 3 x the forward.

    A multiply-add counts 2. The embedding look-up counts nothing, the output layer does; attention scores and values
    count the causal half.
    """
    products = parameters.active(true_experts_per_token)
    if not config.model.tie_embeddings:
        products -= parameters.embedding
    model = config.model
    attention = 2 * model.num_layers * model.sequence_length * model.num_attention_heads * model.head_width
    return 3.0 * (2 * products + attention)


def describe_run(config: Config, resolved: Resolved, padded_vocab_size: int, precision: str) -> list[str]:
    """Return the arithmetic of a run, one fact a line, as ``--dry-run`` and the start-up report show it."""
    parameters, load = count_parameters(config, padded_vocab_size), expected_load(config)
    memory = rank_memory(config, resolved, parameters, precision)
    train, moe = config.train, config.moe
    load_is = "at balance" if moe.router.target_load is None else "held (moe.router.target_load)"
    of_stage = " of the fullest stage" if resolved.layout.pipeline > 1 else ""
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
        f"training state a rank{of_stage}: {memory.total / 2**30:.3f} GiB = weights {memory.weights / 2**30:.3f} + "
        f"gradients {memory.gradients / 2**30:.3f} + optimizer {memory.optimizer / 2**30:.3f} (activations not counted)"
        + (f"; in CPU memory {memory.host / 2**30:.3f} GiB" if memory.host else ""),
        f"compute: {flops_per_token(config, parameters, load) / 1e6:.2f} MFLOP a token, forward and backward",
    ]
