"""Small MoE layers: this project's and Megatron's own, with the same weights. Runs in one process or on every rank."""

from typing import Any

import torch

from tests.distributed.cases import BASE, VOCAB, merged

PLAIN = {
    "num_experts": 8,
    "num_null_experts": 0,
    "top_k": 2,
    "experts": {"kernel": "sequential"},
    "router": {"z_loss_coefficient": 0.0, "balance": {"type": "none"}},
}


def config_of(changes: dict[str, Any], world_size: int = 1) -> tuple[Any, Any]:
    from adamoe_dist.config import config_from_dict, resolve

    config = config_from_dict(merged(BASE, changes))
    return config, resolve(config, world_size)


def model_of(
    changes: dict[str, Any], dtype: torch.dtype = torch.float32, world_size: int = 1, vocab_size: int = VOCAB
) -> Any:
    from adamoe_dist import platform
    from adamoe_dist.model import build_model

    platform.seed_everything(3, deterministic=False)
    config, resolved = config_of(changes, world_size)
    return build_model(config, resolved, vocab_size, dtype, cuda=False).model


def layer_of(changes: dict[str, Any], expert_parallel: int = 1) -> Any:
    """An AdaMoE layer with weights of a size at which experts and routes differ clearly."""
    from adamoe_dist import platform
    from adamoe_dist.model import AdaMoELayer, transformer_config

    platform.seed_everything(3, deterministic=False)
    changes = merged(changes, {"model": {"init_std": 0.3}, "parallel": {"expert": expert_parallel}})
    config, resolved = config_of(changes, expert_parallel)
    kernel = "threaded" if config.moe.experts.kernel == "auto" else config.moe.experts.kernel
    megatron = transformer_config(config, resolved, torch.float32, kernel)
    layer = AdaMoELayer(megatron, layer_number=1)
    layer.set_layer_number(1)
    return layer


def megatrons_layer(ours: Any, **settings: Any) -> Any:
    """Megatron's MoELayer, TopKRouter, all-to-all dispatcher and SequentialMLP with the weights of ``ours``."""
    import copy

    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    config = copy.copy(ours.config)
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    class Experts(SequentialMLP):
        """A class serves both ways in which Megatron's versions build a slot."""

        def __init__(self, num_local_experts: int, config: Any, pg_collection: Any, **_: Any) -> None:
            super().__init__(num_local_experts, config, linear, pg_collection=pg_collection)

    submodules = MoESubmodules(experts=Experts)
    theirs = MoELayer(config, submodules, layer_number=1, pg_collection=get_default_pg_collection())
    theirs.set_layer_number(1)
    assert type(theirs.token_dispatcher).__name__ == "MoEAlltoAllTokenDispatcher"
    assert type(theirs.router).__name__ == "TopKRouter"
    with torch.no_grad():
        theirs.router.weight.copy_(ours.router.weight)
        for expert, weight1, weight2 in zip(
            theirs.experts.local_experts, ours.experts.weight1, ours.experts.weight2, strict=True
        ):
            expert.linear_fc1.weight.copy_(weight1)
            expert.linear_fc2.weight.copy_(weight2)
    return theirs


def hidden_states(rank: int = 0, sequence: int = 24, batch: int = 2, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(40 + rank)
    return torch.randn(sequence, batch, width, generator=generator)


def run_layer(layer: Any, rank: int = 0, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Output, and gradients of input, router and each local expert under a fixed cotangent of some size."""
    hidden = hidden_states(rank).requires_grad_()
    output = layer(hidden)[0]
    output.backward(size * torch.randn(output.shape, generator=torch.Generator().manual_seed(60 + rank)))
    result = {"output": output.detach(), "input": hidden.grad, "router": layer.router.weight.grad}
    experts = layer.experts
    if hasattr(experts, "weight1"):
        fc1, fc2 = list(experts.weight1.grad), list(experts.weight2.grad)
    else:
        fc1 = [expert.linear_fc1.weight.grad for expert in experts.local_experts]
        fc2 = [expert.linear_fc2.weight.grad for expert in experts.local_experts]
    for local, (first, second) in enumerate(zip(fc1, fc2, strict=True)):
        result[f"expert {local} fc1"], result[f"expert {local} fc2"] = first, second
    return result


def run_both(changes: dict[str, Any], expert_parallel: int, rank: int, **settings: Any) -> tuple[Any, Any]:
    ours = layer_of(changes, expert_parallel)
    theirs = megatrons_layer(ours, **settings)
    ours.train(), theirs.train()
    return run_layer(ours, rank), run_layer(theirs, rank)


def run_baseline_on_ranks(moe: dict[str, Any]) -> dict[str, Any]:
    """The counters of the layer on every rank, the products it computed, and the loss Megatron attached."""
    from megatron.core.transformer.moe import router as megatrons

    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups
    from tests.distributed.cases import counted

    launch = Launch.from_environment()
    degrees = {"parallel": {"expert": launch.world_size}}
    initialize_groups(launch, config_of(degrees, launch.world_size)[1])
    try:
        layer = layer_of({"moe": moe}, launch.world_size)
        layer.train()
        rows, attached, maps = [], [], []
        layer.experts.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
        layer.router.register_forward_hook(lambda _, __, outputs: maps.append(outputs[1]))
        scaler = megatrons.MoEAuxLossAutoScaler

        class Seen:
            @staticmethod
            def apply(activation: Any, loss: Any) -> Any:
                attached.append(loss.item())
                return scaler.apply(activation, loss)

        megatrons.MoEAuxLossAutoScaler = Seen
        try:
            result = run_layer(layer, launch.rank)
        finally:
            megatrons.MoEAuxLossAutoScaler = scaler
        sums, (by_load, by_expert) = counted(layer)
        return {
            "sums": sums,
            "by_load": by_load,
            "by_expert": by_expert,
            "rows": rows,
            "attached": attached,
            "map": maps[0],
            "output": result["output"],
        }
    finally:
        destroy_groups()


def run_both_on_ranks(changes: dict[str, Any]) -> tuple[Any, Any]:
    """The same with the experts spread over all ranks; every rank calls it."""
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups

    launch = Launch.from_environment()
    degrees = merged(changes, {"parallel": {"expert": launch.world_size}})
    initialize_groups(launch, config_of(degrees, launch.world_size)[1])
    try:
        return run_both(changes, launch.world_size, launch.rank)
    finally:
        destroy_groups()
