"""The same random weights in the Megatron model and in the transformers class."""

from typing import Any

import torch

from tests.distributed.cases import VOCAB, merged
from tests.model.layers import config_of, model_of

SMALL = {
    "model": {
        "num_layers": 3,
        "num_query_groups": 2,
        "sequence_length": 16,
        "init_std": 0.15,
        "ffn_hidden_size": 80,
        "rotary_base": 500,
        "vocab_size_multiple": 32,
    },
    "moe": {
        "num_experts": 6,
        "num_null_experts": 4,
        "router": {"balance": {"type": "none"}, "z_loss_coefficient": 0.0},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "all_selected-shared_row": {"moe": {"router": {"normalize": "all_selected", "null_init": "shared"}}},
    "none-dense-shared_expert": {
        "moe": {"router": {"normalize": "none"}, "layer_frequency": 2, "shared_expert_hidden_size": 40}
    },
    "all_true-dense_layers-gated": {
        "moe": {
            "router": {"normalize": "all_true"},
            "dense_layers": [0],
            "shared_expert_hidden_size": 40,
            "shared_expert_gate": True,
        }
    },
    "tied-no_null": {"model": {"tie_embeddings": True}, "moe": {"num_null_experts": 0, "top_k": 2}},
    "head_norm-bias-wide_heads": {"model": {"qk_norm": "head", "qkv_bias": True, "head_dim": 24}},
    "joint_norm-all_heads": {"model": {"qk_norm": "all", "num_query_groups": 4}},
    "sigmoid-target_load": {"moe": {"router": {"score_function": "sigmoid", "target_load": 1.3}}},
    "softmax-target_load-switch": {
        "moe": {"router": {"target_load": 1.3, "balance": {"type": "switch", "coefficient": 0.1}}}
    },
    "types-residual-eq6-z": {
        "moe": {
            "null_types": {"identity": 1, "constant": 2},
            "router": {
                "gating_residual": True,
                "balance": {"type": "null_averaged", "coefficient": 0.1},
                "z_loss_coefficient": 0.01,
            },
        }
    },
    "sigmoid-types-residual-dense-grouped": {
        "moe": {
            "null_types": {"identity": 1, "constant": 1},
            "dense_layers": [1],
            "router": {
                "score_function": "sigmoid",
                "normalize": "all_selected",
                "gating_residual": True,
                "balance": {"type": "grouped", "coefficient": 0.1, "target_null_share": 0.3},
            },
        }
    },
    "baseline": {
        "moe": {
            "num_null_experts": 0,
            "top_k": 2,
            "router": {"type": "topk", "balance": {"type": "switch", "coefficient": 0.1}, "z_loss_coefficient": 0.01},
        }
    },
}


def pair_of(changes: dict[str, Any], vocab_size: int = VOCAB) -> tuple[Any, Any, Any]:
    """Return the configuration, the Megatron model and the class; no weight is zero or one where it starts so."""
    changes = merged(SMALL, changes)
    config, _ = config_of(changes)
    megatron = model_of(changes, vocab_size=vocab_size)
    draws = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, tensor in canonical(megatron).items():
            if "norm" in name or "bias" in name or "constant" in name or "residual" in name:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=draws))
    return config, megatron, class_of(config, megatron, vocab_size)


def canonical(megatron: Any) -> dict[str, torch.Tensor]:
    from adamoe_dist.model import canonical_buffers

    weights = {name.removeprefix("gpt."): parameter for name, parameter in megatron.named_parameters()}
    return weights | canonical_buffers(megatron)


def class_tensors(config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the class's tensors are, of canonical ones, by the table."""
    from adamoe_dist.hf.from_checkpoint import class_weights

    found = {}
    for weight in class_weights(config, tensors["embedding.word_embeddings.weight"].shape[0]):
        if weight.tensor not in tensors:
            continue
        whole = tensors[weight.tensor]
        assert tuple(whole.shape) == weight.whole, weight
        blocks = [
            whole[tuple(slice(at, at + size) for at, size in zip(place.offsets, place.sizes, strict=True))]
            for place in weight.places
        ]
        found[weight.name] = torch.cat([block.flatten() for block in blocks]).view(weight.shape)
    return found


def class_of(config: Any, megatron: Any, vocab_size: int) -> Any:
    from adamoe_dist.convert import FAMILIES
    from adamoe_dist.hf import AdaMoEConfig, AdaMoEForCausalLM

    tensors = class_tensors(config, {name: tensor.detach() for name, tensor in canonical(megatron).items()})
    model = AdaMoEForCausalLM(AdaMoEConfig.from_dict(FAMILIES["adamoe"].write(config, vocab_size)))
    if config.model.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model


def class_gradients(config: Any, megatron: Any) -> dict[str, torch.Tensor]:
    """The Megatron model's gradients under the class's names."""
    gradients = {name.removeprefix("gpt."): parameter.grad for name, parameter in megatron.named_parameters()}
    return class_tensors(config, gradients)
