"""How a run is cut over its ranks: every degree of parallelism, checked together and explained."""

from dataclasses import dataclass
from math import gcd

from adamoe_dist.config.tree import Config


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All degrees of a run.

    Dense weights: ``world_size = tensor x pipeline x context x data``. Experts: ``world_size = pipeline x expert_tensor
    x expert x expert_data``; expert-parallel ranks are taken from the tensor, context and data ranks of one stage. With
    ``tensor > 1`` the activations between matrix products are cut along the sequence (sequence parallelism), so that
    every rank of a stage routes tokens of its own.
    """

    world_size: int
    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int
    expert_tensor: int
    expert_data: int

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that average the gradients of one dense weight: data times context."""
        return self.data * self.context

    @property
    def experts_are_apart(self) -> bool:
        """Whether experts are reduced over other ranks than dense weights are."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    def explain(self) -> str:
        """Return the layout in one line."""
        dense = _product(tensor=self.tensor, pipeline=self.pipeline, context=self.context, data=self.data)
        sequence = ", sequence-parallel" if self.tensor > 1 else ""
        experts = f"expert-parallel {self.expert}"
        if self.expert_tensor > 1:
            experts += f" x expert-tensor {self.expert_tensor}"
        return f"{self.world_size} = {dense}{sequence} (experts: {experts} x expert-data {self.expert_data})"


def _product(**degrees: int) -> str:
    """Name the degrees that are not 1; the last always."""
    *_, last = degrees
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1 or name == last)


def find_layout(config: Config, world_size: int, problems: list[str]) -> Layout:
    """Check the degrees against the model and the world size and return them.

    Problems are added to ``problems``, each with its key, its value and the way out; the layout returned then only
    serves to look for more of them.
    """
    parallel, before = config.parallel, len(problems)
    _check_against_model(config, problems)
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        problems.append(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x parallel.context="
            f"{parallel.context} = {model_ranks} does not divide the world size {world_size}; start a multiple of "
            f"{model_ranks} ranks or lower a degree"
        )
        return _alone(world_size)
    expert = _expert_degree(config, world_size, problems)
    if len(problems) > before:
        return _alone(world_size)
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=world_size // model_ranks,
        expert=expert,
        expert_tensor=parallel.expert_tensor,
        expert_data=world_size // (parallel.pipeline * parallel.expert_tensor * expert),
    )


def _alone(world_size: int) -> Layout:
    return Layout(
        world_size=world_size,
        tensor=1,
        pipeline=1,
        context=1,
        data=world_size,
        expert=1,
        expert_tensor=1,
        expert_data=world_size,
    )


def _expert_degree(config: Config, world_size: int, problems: list[str]) -> int:
    parallel, experts = config.parallel, config.moe.num_experts
    stage_ranks = world_size // parallel.pipeline
    if stage_ranks % parallel.expert_tensor:
        problems.append(
            f"parallel.expert_tensor={parallel.expert_tensor} does not divide the {stage_ranks} ranks of a pipeline "
            "stage; lower it"
        )
        return 1
    available = stage_ranks // parallel.expert_tensor
    if parallel.expert == "auto":
        return gcd(available, experts)
    if experts % parallel.expert:
        problems.append(
            f"parallel.expert={parallel.expert} does not divide moe.num_experts={experts}; change one of them"
        )
    if available % parallel.expert:
        problems.append(
            f"parallel.expert={parallel.expert} does not divide the world size {world_size} / parallel.pipeline="
            f"{parallel.pipeline} / parallel.expert_tensor={parallel.expert_tensor} = {available}; start more ranks or "
            "set parallel.expert=auto"
        )
        return 1
    return parallel.expert


def _check_against_model(config: Config, problems: list[str]) -> None:
    parallel = config.parallel
    _check_tensor(config, problems)
    _check_context(config, problems)
    _check_pipeline(config, problems)
    cut, inner = parallel.expert_tensor, config.moe.expert_hidden_size
    if inner % cut:
        problems.append(
            f"parallel.expert_tensor={cut} does not divide moe.expert_hidden_size={inner}; change one of them"
        )


def _check_tensor(config: Config, problems: list[str]) -> None:
    tensor, model = config.parallel.tensor, config.model
    has_dense = len(config.moe_layers) < model.num_layers
    ffn = model.ffn_hidden_size or 4 * model.hidden_size if has_dense else None
    for name, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.num_query_groups or model.num_attention_heads),
        ("model.vocab_size_multiple", model.vocab_size_multiple),
        ("model.sequence_length", model.sequence_length),
        ("model.ffn_hidden_size", ffn),
        ("moe.shared_expert_hidden_size", config.moe.shared_expert_hidden_size),
    ):
        if size is not None and size % tensor:
            problems.append(f"parallel.tensor={tensor} does not divide {name}={size}; change one of them")


def _check_context(config: Config, problems: list[str]) -> None:
    parallel, model = config.parallel, config.model
    if parallel.context == 1:
        return
    groups = model.num_query_groups or model.num_attention_heads
    both = parallel.tensor * parallel.context
    for name, size in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", groups)):
        if size % both:
            problems.append(
                f"parallel.context={parallel.context} spreads heads over ranks (all-to-all), but parallel.tensor x "
                f"parallel.context = {both} does not divide model.{name}={size}; lower one of them"
            )
    if model.sequence_length % both:
        problems.append(
            f"parallel.context={parallel.context}: parallel.tensor x parallel.context = {both} does not divide "
            f"model.sequence_length={model.sequence_length}; change one of them"
        )


def _check_pipeline(config: Config, problems: list[str]) -> None:
    stages, layers = config.parallel.pipeline, config.model.num_layers
    if stages == 1:
        return
    if layers % stages:
        problems.append(f"parallel.pipeline={stages} does not divide model.num_layers={layers}; change one of them")
    elif len({layer // (layers // stages) for layer in config.moe_layers}) < stages:
        dense = f", moe.dense_layers={config.moe.dense_layers}" if config.moe.dense_layers else ""
        problems.append(
            f"parallel.pipeline={stages} leaves a stage of {layers // stages} layers without experts at "
            f"moe.layer_frequency={config.moe.layer_frequency}{dense}; lower parallel.pipeline or have more MoE layers"
        )
    if config.moe.router.gating_residual:
        problems.append(
            f"moe.router.gating_residual=true adds each router's scores to the next one's, which parallel.pipeline="
            f"{stages} puts on another rank; set one of them to false or 1"
        )
    if config.zero.stage == 3:
        problems.append(
            f"zero.stage=3 gathers weights in an order that the stages of parallel.pipeline={stages} do not share; use "
            "zero.stage=2 or parallel.pipeline=1"
        )
