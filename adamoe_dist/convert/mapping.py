"""Which matrix of a Hugging Face checkpoint is which part of which canonical tensor.

Legend of shapes: V vocabulary, H hidden size, D width of a head, F inner width, E true experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from adamoe_dist.config import Config

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Place:
    """Where rows of a matrix lie in a canonical tensor.

    Attributes:
        start: first row of the matrix.
        stop: row after the last one.
        offsets: of the block in the canonical tensor.
        sizes: of the block; it holds as many elements as the rows do, in the same order.
    """

    start: int
    stop: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of a Hugging Face checkpoint and its place in a canonical tensor.

    Attributes:
        name: in the Hugging Face checkpoint.
        shape: there.
        tensor: canonical name, without ``model.``.
        whole: shape of the canonical tensor.
        places: of its rows; together all of them.
        pad_rows: rows of zeros that follow it in the canonical tensor (the padding of the vocabulary).
        is_copy: a Hugging Face checkpoint may have it although another tensor says the same (a tied output layer);
            it is compared where it is there, and takes no place in the canonical tensor.
        stays_fp32: it is written in fp32, whatever type was asked for.
    """

    name: str
    shape: tuple[int, ...]
    tensor: str
    whole: tuple[int, ...]
    places: tuple[Place, ...]
    pad_rows: int = 0
    is_copy: bool = False
    stays_fp32: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Names:
    """What a family calls its tensors; ``{layer}`` and ``{expert}`` are numbers from 0."""

    embedding: str = "model.embed_tokens.weight"
    output: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"
    feed_forward_norm: str = "post_attention_layernorm.weight"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj.weight"
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    dense_gate: str = "mlp.gate_proj.weight"
    dense_up: str = "mlp.up_proj.weight"
    dense_down: str = "mlp.down_proj.weight"
    router: str = "mlp.gate.weight"
    expert_gate: str = "mlp.experts.{expert}.gate_proj.weight"
    expert_up: str = "mlp.experts.{expert}.up_proj.weight"
    expert_down: str = "mlp.experts.{expert}.down_proj.weight"
    shared_gate: str = "mlp.shared_expert.gate_proj.weight"
    shared_up: str = "mlp.shared_expert.up_proj.weight"
    shared_down: str = "mlp.shared_expert.down_proj.weight"
    shared_score: str = "mlp.shared_expert_gate.weight"


def layer_prefix(layer: int) -> str:
    """Return what the canonical names of a layer's tensors begin with."""
    return f"decoder.layers.{layer}."


def whole_weight(name: str, tensor: str, *shape: int) -> Weight:
    """Return a weight that is a canonical tensor, in shape ``shape``."""
    return Weight(name, shape, tensor, shape, (Place(0, shape[0], (0,) * len(shape), shape),))


def stacked(name: str, tensor: str, shape: tuple[int, int], number: int, count: int) -> Weight:
    """Return the matrix (R, C) that is the ``number``-th of ``count`` above each other in a tensor (count R, C)."""
    rows, columns = shape
    place = Place(0, rows, (number * rows, 0), shape)
    return Weight(name, shape, tensor, (count * rows, columns), (place,))


def expert_matrix(
    name: str, tensor: str, shape: tuple[int, int], expert: int, experts: int, number: int = 0, count: int = 1
) -> Weight:
    """Return a matrix (R, C) of one expert, the ``number``-th of ``count`` above each other in (E, count R, C)."""
    rows, columns = shape
    place = Place(0, rows, (expert, number * rows, 0), (1, rows, columns))
    return Weight(name, shape, tensor, (experts, count * rows, columns), (place,))


def standard_weights(config: Config, vocab_size: int, names: Names) -> Iterator[Weight]:
    """Yield the tensors of a model in the order of its layers.

    Args:
        config: the model's sections.
        vocab_size: V, rows of the embedding in the Hugging Face checkpoint.
        names: the family's.
    """
    yield _vocabulary(names.embedding, EMBEDDING, config, vocab_size)
    for layer in range(config.model.num_layers):
        yield from attention_weights(config, layer, names)
        yield from feed_forward_weights(config, layer, names)
    yield whole_weight(names.final_norm, FINAL_NORM, config.model.hidden_size)
    if config.model.tie_embeddings:
        shape = (vocab_size, config.model.hidden_size)
        yield Weight(names.output, shape, EMBEDDING, _padded(config, vocab_size), (), is_copy=True)
    else:
        yield _vocabulary(names.output, OUTPUT, config, vocab_size)


def _padded(config: Config, vocab_size: int) -> tuple[int, int]:
    return config.padded_vocab_size(vocab_size), config.model.hidden_size


def _vocabulary(name: str, tensor: str, config: Config, vocab_size: int) -> Weight:
    """Return an embedding (V, H), the first rows of a tensor (padded V, H)."""
    whole, shape = _padded(config, vocab_size), (vocab_size, config.model.hidden_size)
    return Weight(name, shape, tensor, whole, (Place(0, vocab_size, (0, 0), shape),), whole[0] - vocab_size)


def attention_weights(config: Config, layer: int, names: Names) -> Iterator[Weight]:
    """Yield the tensors of one layer's attention, and of the norms before it and before the feed-forward."""
    model, head_width = config.model, config.model.head_width
    theirs, ours = names.layer.format(layer=layer), layer_prefix(layer)
    yield whole_weight(theirs + names.input_norm, ours + "input_layernorm.weight", model.hidden_size)
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        for which, name in enumerate((names.query, names.key, names.value)):
            yield _projection(f"{theirs}{name}.{kind}", f"{ours}self_attention.linear_qkv.{kind}", config, which)
    if model.qk_norm != "none":
        heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        for name, norm, number in ((names.query_norm, "q", heads), (names.key_norm, "k", groups)):
            width = head_width * (number if model.qk_norm == "all" else 1)
            yield whole_weight(theirs + name, f"{ours}self_attention.{norm}_layernorm.weight", width)
    yield whole_weight(
        theirs + names.attention_output,
        ours + "self_attention.linear_proj.weight",
        model.hidden_size,
        model.num_attention_heads * head_width,
    )
    yield whole_weight(theirs + names.feed_forward_norm, ours + "pre_mlp_layernorm.weight", model.hidden_size)


def _projection(name: str, tensor: str, config: Config, which: int) -> Weight:
    """Return the projection to queries, keys or values (``which``: 0, 1, 2).

    Megatron has for each group of heads its queries, its key and its value above each other.
    """
    model, width = config.model, config.model.head_width
    groups = model.num_query_groups or model.num_attention_heads
    queries = model.num_attention_heads // groups
    rows = width * (queries if which == 0 else 1)
    first = (0, queries, queries + 1)[which] * width
    rest = (model.hidden_size,) if tensor.endswith(".weight") else ()
    stride = (queries + 2) * width
    places = tuple(
        Place(group * rows, (group + 1) * rows, (group * stride + first, *(0 for _ in rest)), (rows, *rest))
        for group in range(groups)
    )
    return Weight(name, (groups * rows, *rest), tensor, (groups * stride, *rest), places)


def feed_forward_weights(config: Config, layer: int, names: Names) -> Iterator[Weight]:
    """Yield the tensors of one layer's feed-forward: dense, or router, experts and shared expert."""
    theirs, ours, hidden = names.layer.format(layer=layer), layer_prefix(layer) + "mlp.", config.model.hidden_size
    if layer not in config.moe_layers:
        inner = config.model.ffn_hidden_size or 4 * hidden
        yield from _swiglu(theirs, ours, (names.dense_gate, names.dense_up, names.dense_down), hidden, inner)
        return
    moe, experts = config.moe, config.moe.num_experts
    yield whole_weight(theirs + names.router, ours + "router.weight", experts, hidden)
    up, down = (moe.expert_hidden_size, hidden), (hidden, moe.expert_hidden_size)
    for expert in range(experts):
        for number, name in enumerate((names.expert_gate, names.expert_up)):
            full = theirs + name.format(expert=expert)
            yield expert_matrix(full, ours + "experts.weight1", up, expert, experts, number, 2)
        full = theirs + names.expert_down.format(expert=expert)
        yield expert_matrix(full, ours + "experts.weight2", down, expert, experts)
    if moe.shared_expert_hidden_size:
        shared = (names.shared_gate, names.shared_up, names.shared_down)
        yield from _swiglu(theirs, ours + "shared_experts.", shared, hidden, moe.shared_expert_hidden_size)
        if moe.shared_expert_gate:
            yield whole_weight(theirs + names.shared_score, ours + "shared_experts.gate_weight", 1, hidden)


def _swiglu(theirs: str, ours: str, names: tuple[str, str, str], hidden: int, inner: int) -> Iterator[Weight]:
    for number, name in enumerate(names[:2]):
        yield stacked(theirs + name, ours + "linear_fc1.weight", (inner, hidden), number, 2)
    yield whole_weight(theirs + names[2], ours + "linear_fc2.weight", hidden, inner)
