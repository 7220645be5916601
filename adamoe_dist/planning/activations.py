"""Bytes that the forward pass keeps for the backward pass, from the tensors that the model's operations save.

Counted tensor by tensor, for one token of a rank (tokens of a micro-batch over context and tensor ranks). H hidden, q
and g the widths of all queries and of all keys, b bytes of the compute precision, F an inner width.

- A norm computes in fp32 and keeps its input; on CPU, where torch composes it, also the normalised input. Its output
  is kept by the product that reads it, in the compute precision; the router keeps one in fp32 (the same tensor if the
  model computes in fp32).
- Attention keeps queries, keys and values before and after the rotary positions (values once), and its output. Norms
  of queries and keys keep what other norms do; grouped queries are copied for them.
- True experts keep each row, 2F of the first product and, but for the kernel on CPU, 3F of the activation; indices.
- A dense feed-forward or a shared expert keeps 5F.
- The output layer keeps the scores in fp32.
"""

from dataclasses import dataclass

from adamoe_dist.config import Config, Resolved


@dataclass(frozen=True, kw_only=True)
class KeptPerToken:
    """Bytes a token of a rank."""

    moe_layer: float
    dense_layer: float
    layer_input: float
    output: float
    """The last norm and the scores."""
    whole_moe_layer: float
    """Of an MoE layer without recomputation: what recomputation brings back for one layer at a time."""
    whole_dense_layer: float
    scores: float


def kept_per_token(
    config: Config, resolved: Resolved, padded_vocab_size: int, precision: str, load: float, is_cpu: bool
) -> KeptPerToken:
    """Return what a token of a rank keeps at a load of ``load`` true experts a token."""
    model, moe = config.model, config.moe
    width, size = model.hidden_size, 4 if precision == "fp32" else 2
    queries = model.num_attention_heads * model.head_width
    keys = (model.num_query_groups or model.num_attention_heads) * model.head_width
    norm = (2 if is_cpu else 1) * 4.0 * width
    attention = size * (3.0 * queries + 3 * keys) + 2 * norm
    attention += size * width + 16.0 * model.head_width / resolved.micro_batch_size
    if model.qk_norm != "none":
        attention += ((size == 2) + is_cpu) * 4.0 * (queries + keys) + (
            4.0 * queries if keys < queries and size == 4 else 0.0
        )
    recompute = config.train.recompute
    ffn = 5.0 * size * (model.ffn_hidden_size or 4 * width)
    dense = attention + size * width + ffn
    cut = resolved.layout.expert_tensor
    kept_of_inner = 2 if _kernel(config, is_cpu) == "threaded" else 5
    columns = moe.num_experts + moe.num_null_experts
    router = 4.0 * width + 8.0 * columns + 4.0 * moe.num_experts + 13.0 * moe.top_k
    shared = 5.0 * size * (moe.shared_expert_hidden_size or 0)
    input_of_shared = size * width if shared and size == 2 else 0
    rows = load * (size * width * cut + 20.0 * cut)
    inner = load * size * kept_of_inner * moe.expert_hidden_size
    whole_moe = attention + router + rows + inner + shared + input_of_shared
    selective = recompute == "selective"
    per_layer = (whole_moe - (inner + shared if selective else 0.0), dense - (ffn if selective else 0.0))
    if recompute == "full":
        per_layer = (float(size * width), float(size * width))
    scores = 4.0 * padded_vocab_size
    return KeptPerToken(
        moe_layer=per_layer[0],
        dense_layer=per_layer[1],
        layer_input=float(size * width),
        output=scores + norm + size * width,
        whole_moe_layer=whole_moe,
        whole_dense_layer=dense,
        scores=scores,
    )


def tokens_of_a_rank(config: Config, resolved: Resolved) -> float:
    """Return the tokens of a micro-batch that a rank routes: a part of each sequence."""
    layout = resolved.layout
    return resolved.micro_batch_size * config.model.sequence_length / (layout.context * layout.tensor)


def _kernel(config: Config, is_cpu: bool) -> str:
    kernel = config.moe.experts.kernel
    return ("threaded" if is_cpu else "grouped_mm") if kernel == "auto" else kernel
