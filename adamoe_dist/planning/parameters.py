"""How many weights a model has, in all and on a rank, from its configuration alone."""

from dataclasses import dataclass

from adamoe_dist.config import Config, Layout


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


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Weights of one layer: ``cut`` ones are spread over tensor-parallel ranks, ``whole`` ones are on each of them."""

    cut: int
    whole: int
    expert: int


def layer_parameters(config: Config, has_experts: bool) -> LayerParameters:
    """Count the weights of a layer, the residual of the gating scores left out."""
    model, moe = config.model, config.moe
    width, queries = model.hidden_size, model.num_attention_heads * model.head_width
    keys = (model.num_query_groups or model.num_attention_heads) * model.head_width
    attention = 2 * width * (queries + keys)
    if model.qkv_bias:
        attention += queries + 2 * keys
    if model.qk_norm == "all":
        attention += queries + keys
    norms = 2 * width + (2 * model.head_width if model.qk_norm == "head" else 0)
    if not has_experts:
        return LayerParameters(cut=attention + 3 * width * (model.ffn_hidden_size or 4 * width), whole=norms, expert=0)
    null_rows = 1 if moe.num_null_experts and moe.router.null_init == "shared" else moe.num_null_experts
    router = (moe.num_experts + null_rows) * width + 3 * width * moe.null_types.constant
    return LayerParameters(
        cut=attention + 3 * width * (moe.shared_expert_hidden_size or 0),
        whole=router + norms + (width if moe.shared_expert_gate else 0),
        expert=moe.num_experts * 3 * width * moe.expert_hidden_size,
    )


def count_parameters(config: Config, padded_vocab_size: int) -> Parameters:
    """Count the weights of the model that :func:`adamoe_dist.model.build_model` builds."""
    model, moe = config.model, config.moe
    moe_layers = len(config.moe_layers)
    with_experts, without = layer_parameters(config, True), layer_parameters(config, False)
    embedding = padded_vocab_size * model.hidden_size
    return Parameters(
        dense=embedding * (1 if model.tie_embeddings else 2)
        + moe_layers * (with_experts.cut + with_experts.whole)
        + (model.num_layers - moe_layers) * (without.cut + without.whole)
        + gating_residual_parameters(config)
        + model.hidden_size,
        expert=moe_layers * with_experts.expert,
        embedding=embedding,
        one_expert=3 * model.hidden_size * moe.expert_hidden_size,
        moe_layers=moe_layers,
    )


def gating_residual_parameters(config: Config) -> int:
    """Count the weights that carry each router's scores to the next one's."""
    moe = config.moe
    between = len(config.moe_layers) - 1
    return between * (moe.num_experts + moe.num_null_experts) ** 2 if moe.router.gating_residual else 0


def expected_load(config: Config) -> float:
    """Return the true experts a token that the run is laid out for: :attr:`MoEConfig.expected_load`."""
    return config.moe.expected_load


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Weights on one rank: ``dense`` and ``expert`` ones that it trains, ``copied`` ones that another stage trains."""

    dense: float
    expert: float
    copied: float = 0.0


def rank_parameters(config: Config, layout: Layout, embedding: int) -> list[RankParameters]:
    """Count the weights of a rank of each pipeline stage, before ZeRO shards them.

    Matrices are cut over tensor-parallel ranks, experts over expert- and expert-tensor-parallel ones; norms, routers
    and null experts are whole on each. With tied embeddings the last of several stages has a copy of the first one's.

    Args:
        config: the tree.
        layout: its degrees.
        embedding: weights of the token embedding.
    """
    model = config.model
    with_experts, without = layer_parameters(config, True), layer_parameters(config, False)
    per_stage, last = model.num_layers // layout.pipeline, layout.pipeline - 1
    found = []
    for stage in range(layout.pipeline):
        moe_layers = sum(layer // per_stage == stage for layer in config.moe_layers)
        others = per_stage - moe_layers
        cut = moe_layers * with_experts.cut + others * without.cut
        whole = moe_layers * with_experts.whole + others * without.whole
        whole += gating_residual_parameters(config) if layout.pipeline == 1 else 0
        whole += model.hidden_size if stage == last else 0
        has_output_of_its_own = stage == last and not model.tie_embeddings
        cut += embedding * ((stage == 0) + has_output_of_its_own)
        is_copied = stage == last > 0 and model.tie_embeddings
        found.append(
            RankParameters(
                dense=cut / layout.tensor + whole,
                expert=moe_layers * with_experts.expert / (layout.expert * layout.expert_tensor),
                copied=embedding / layout.tensor if is_copied else 0.0,
            )
        )
    return found
