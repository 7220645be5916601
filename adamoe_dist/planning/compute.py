"""Floating-point operations of a token, by kind of work: what the model needs and what the hardware does for it."""

from dataclasses import dataclass

from adamoe_dist.config import Config
from adamoe_dist.planning.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Operations of one token's forward pass through one layer, multiply-adds as 2.

    ``projections`` are those of attention, ``attention`` its scores and values over the causal half, ``feed_forward``
    what a dense layer or a shared expert computes.
    """

    projections: float
    attention: float
    router: float = 0.0
    experts: float = 0.0
    feed_forward: float = 0.0

    @property
    def total(self) -> float:
        """All of the layer."""
        return self.projections + self.attention + self.router + self.experts + self.feed_forward

    @property
    def recomputed_selectively(self) -> float:
        """What ``train.recompute=selective`` computes twice."""
        return self.experts + self.feed_forward


def layer_flops(config: Config, has_experts: bool, load: float) -> LayerFlops:
    """Return the operations of one layer at a load of ``load`` true experts a token."""
    model, moe = config.model, config.moe
    queries = model.num_attention_heads * model.head_width
    keys = (model.num_query_groups or model.num_attention_heads) * model.head_width
    projections = 2.0 * 2 * model.hidden_size * (queries + keys)
    attention = 2.0 * model.sequence_length * queries
    if not has_experts:
        inner = model.ffn_hidden_size or 4 * model.hidden_size
        return LayerFlops(
            projections=projections, attention=attention, feed_forward=_feed_forward(model.hidden_size, inner)
        )
    columns = moe.num_experts + moe.num_null_experts
    return LayerFlops(
        projections=projections,
        attention=attention,
        router=2.0 * columns * model.hidden_size,
        experts=load * _feed_forward(model.hidden_size, moe.expert_hidden_size),
        feed_forward=_feed_forward(model.hidden_size, moe.shared_expert_hidden_size or 0),
    )


def output_flops(config: Config, padded_vocab_size: int) -> float:
    """Return the operations of one token's forward pass through the output layer."""
    return 2.0 * config.model.hidden_size * padded_vocab_size


def computed_load(config: Config, load: float) -> float:
    """Return the pairs a token that experts compute at a load: more where rows are padded to a capacity.

    Without padding nothing is taken off for what a capacity drops.
    """
    factor = config.moe.router.capacity_factor
    if config.moe.dispatcher.pad_to_capacity and factor is not None:
        return config.moe.expected_load * factor
    return load


def flops_per_token(config: Config, parameters: Parameters, true_experts_per_token: float) -> float:
    """Return floating-point operations of training on one token: forward and backward, 3 x the forward.

    A multiply-add counts 2, a weight of a norm or a bias as one of a matrix. The embedding look-up counts nothing, the
    output layer does; attention scores and values count the causal half.
    """
    products = parameters.active(true_experts_per_token)
    if not config.model.tie_embeddings:
        products -= parameters.embedding
    model = config.model
    attention = 2 * model.num_layers * model.sequence_length * model.num_attention_heads * model.head_width
    return 3.0 * (2 * products + attention)


def hardware_flops_per_token(config: Config, parameters: Parameters, load: float) -> float:
    """Return what is computed for one token: :func:`flops_per_token`, recomputation and padding included."""
    with_experts, without = (layer_flops(config, has, computed_load(config, load)) for has in (True, False))
    moe, others = parameters.moe_layers, config.model.num_layers - parameters.moe_layers
    padding = 3.0 * moe * (with_experts.experts - layer_flops(config, True, load).experts)
    again = 0.0
    if config.train.recompute == "selective":
        again = moe * with_experts.recomputed_selectively + others * without.recomputed_selectively
    elif config.train.recompute == "full":
        again = moe * with_experts.total + others * without.total
    return flops_per_token(config, parameters, load) + padding + again


def _feed_forward(width: int, inner: int) -> float:
    """SwiGLU: three products."""
    return 2.0 * 3 * width * inner
