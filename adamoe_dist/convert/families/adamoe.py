"""AdaMoE: this project's own class, which has every model that it trains."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from adamoe_dist.config import Config
from adamoe_dist.convert.family import Family
from adamoe_dist.convert.hf_config import HFConfig
from adamoe_dist.convert.mapping import (
    EMBEDDING,
    FINAL_NORM,
    OUTPUT,
    Names,
    Place,
    Weight,
    attention_weights,
    feed_forward_weights,
    layer_prefix,
    whole_weight,
)
from adamoe_dist.routing import BalanceKind, Normalize, ScoreFunction, annealed_coefficient

CODE = ("configuration_adamoe", "layers_adamoe", "modeling_adamoe", "routing_adamoe")
AUTO_MAP = {
    "AutoConfig": "configuration_adamoe.AdaMoEConfig",
    "AutoModel": "modeling_adamoe.AdaMoEModel",
    "AutoModelForCausalLM": "modeling_adamoe.AdaMoEForCausalLM",
}


class AdaMoE(Family):
    """``AdaMoEForCausalLM``; the padding of the vocabulary stays, so that no tensor changes on the way."""

    model_type = "adamoe"
    architecture = "AdaMoEForCausalLM"
    names = Names(router="mlp.router.weight")

    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take AdaMoE's keys."""
        heads, hidden = given.integer("num_attention_heads"), given.integer("hidden_size")
        groups, width = given.integer("num_key_value_heads", heads), given.optional_integer("head_dim")
        given.ignore("tokenizer_vocab_size")
        model = {
            "num_layers": given.integer("num_hidden_layers"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": None if groups == heads else groups,
            "head_dim": None if width in (None, hidden / heads) else width,
            "qk_norm": given.word("qk_norm", "none", "none", "head", "all"),
            "qkv_bias": given.flag("qkv_bias", False),
            "sequence_length": given.integer("max_position_embeddings"),
            "ffn_hidden_size": given.optional_integer("intermediate_size"),
            "rotary_base": given.rotary_base(10000.0),
            "norm_epsilon": given.number("rms_norm_eps", 1e-5),
            "tie_embeddings": given.flag("tie_word_embeddings", False),
            "init_std": given.number("initializer_range", 0.02),
            "vocab_size_multiple": given.integer("vocab_size_multiple", 1),
        }
        shared = given.optional_integer("shared_expert_intermediate_size")
        moe = {
            "num_experts": given.integer("num_experts"),
            "num_null_experts": given.integer("num_null_experts", 0, least=0),
            "top_k": given.integer("num_experts_per_tok"),
            "expert_hidden_size": given.integer("moe_intermediate_size"),
            "shared_expert_hidden_size": shared,
            "shared_expert_gate": given.flag("shared_expert_gate", False),
            "layer_frequency": given.integer("layer_frequency", 1),
            "dense_layers": given.integers("dense_layers"),
            "null_types": {
                "identity": given.integer("num_identity_experts", 0, least=0),
                "constant": given.integer("num_constant_experts", 0, least=0),
            },
            "router": self._read_router(given),
        }
        return model, moe

    def _read_router(self, given: HFConfig) -> dict[str, Any]:
        coefficient = given.optional_number("router_aux_loss_coef")
        return {
            "score_function": given.word("score_function", "softmax", *get_args(ScoreFunction)),
            "normalize": given.word("normalize", "true_experts", *get_args(Normalize)),
            "null_init": _null_init(given),
            "gating_residual": given.flag("gating_residual", False),
            "target_load": given.optional_number("target_load"),
            "capacity_factor": given.optional_number("capacity_factor"),
            "z_loss_coefficient": given.optional_number("router_z_loss_coef") or 0.0,
            "balance": {
                "type": given.word("router_balance", "null_averaged", *get_args(BalanceKind), "none"),
                "coefficient": 0.02 if coefficient is None else coefficient,
                "target_null_share": given.optional_number("router_target_null_share"),
            },
        }

    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return AdaMoE's keys; the balance loss has the coefficient of the end of the run."""
        model, moe = config.model, config.moe
        router, balance = moe.router, moe.router.balance
        last_coefficient = annealed_coefficient(
            config.total_steps,
            balance.coefficient,
            balance.final_coefficient,
            balance.anneal_steps or config.total_steps,
        )
        return {
            "architectures": [self.architecture],
            "auto_map": dict(AUTO_MAP),
            "model_type": self.model_type,
            "vocab_size": config.padded_vocab_size(vocab_size),
            "tokenizer_vocab_size": vocab_size,
            "vocab_size_multiple": model.vocab_size_multiple,
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
            "head_dim": model.head_width,
            "qk_norm": model.qk_norm,
            "qkv_bias": model.qkv_bias,
            "max_position_embeddings": model.sequence_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rotary_base)},
            "rms_norm_eps": model.norm_epsilon,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
            "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
            "layer_frequency": moe.layer_frequency,
            "dense_layers": list(moe.dense_layers),
            "num_experts": moe.num_experts,
            "num_null_experts": moe.num_null_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_hidden_size,
            "shared_expert_intermediate_size": moe.shared_expert_hidden_size,
            "shared_expert_gate": moe.shared_expert_gate,
            "score_function": router.score_function,
            "normalize": router.normalize,
            "shared_null_row": router.null_init == "shared" and moe.num_null_experts > 0,
            "null_init": router.null_init if moe.num_null_experts > 0 else None,
            "num_identity_experts": moe.null_types.identity,
            "num_constant_experts": moe.null_types.constant,
            "gating_residual": router.gating_residual,
            "target_load": router.target_load,
            "capacity_factor": router.capacity_factor,
            "router_balance": balance.type,
            "router_aux_loss_coef": last_coefficient,
            "router_target_null_share": balance.target_null_share,
            "router_z_loss_coef": router.z_loss_coefficient,
            "output_router_logits": False,
            "use_cache": True,
        }

    def weights(self, config: Config, vocab_size: int) -> Iterator[Weight]:
        """Yield every tensor; an expert's matrices lie stacked, as in training."""
        rows, hidden = config.padded_vocab_size(vocab_size), config.model.hidden_size
        yield whole_weight(self.names.embedding, EMBEDDING, rows, hidden)
        for layer in range(config.model.num_layers):
            yield from attention_weights(config, layer, self.names)
            for weight in feed_forward_weights(config, layer, self.names):
                if ".mlp.experts." not in weight.tensor:
                    yield weight
            if layer in config.moe_layers:
                yield from _moe_weights(config, layer)
        yield whole_weight(self.names.final_norm, FINAL_NORM, hidden)
        if config.model.tie_embeddings:
            yield Weight(self.names.output, (rows, hidden), EMBEDDING, (rows, hidden), (), is_copy=True)
        else:
            yield whole_weight(self.names.output, OUTPUT, rows, hidden)

    def extra_files(self, config: Config) -> dict[str, Path]:
        """Return the code of the class."""
        import adamoe_dist.hf

        folder = Path(adamoe_dist.hf.__file__).parent
        return {f"{name}.py": folder / f"{name}.py" for name in CODE}


def _null_init(given: HFConfig) -> Any:
    """Take how the null rows were drawn; without a word on it, a row for each counts as drawn at random."""
    is_shared, drawn = given.flag("shared_null_row", False), given.take("null_init")
    allowed = ("shared",) if is_shared else ("random", "copy")
    if drawn is not None and drawn not in allowed:
        given.refuse("null_init", drawn, f"with shared_null_row={is_shared} it is {' or '.join(allowed)}")
    return allowed[0] if drawn is None else drawn


def _moe_weights(config: Config, layer: int) -> Iterator[Weight]:
    """Yield what no other family has: stacked experts, null experts, further weights of the router."""
    moe, hidden = config.moe, config.model.hidden_size
    theirs, ours = f"model.layers.{layer}.mlp.", f"{layer_prefix(layer)}mlp."
    experts, null, inner = moe.num_experts, moe.num_null_experts, moe.expert_hidden_size
    yield _experts(f"{theirs}experts.gate_up_proj", f"{ours}experts.weight1", experts, 2 * inner, hidden)
    yield _experts(f"{theirs}experts.down_proj", f"{ours}experts.weight2", experts, hidden, inner)
    if null:
        rows = 1 if moe.router.null_init == "shared" else null
        yield whole_weight(f"{theirs}router.null_weight", f"{ours}router.null_weight", rows, hidden)
    if moe.router.gating_residual and layer != config.moe_layers[0]:
        name, columns = "router.gating_residual_weight", experts + null
        yield whole_weight(theirs + name, ours + name, columns, columns)
    if moe.router.target_load is not None:
        bias = whole_weight(f"{theirs}router.expert_bias", f"{ours}router.expert_bias", experts)
        yield replace(bias, stays_fp32=True)
    if moe.null_types.constant:
        constant = moe.null_types.constant
        yield whole_weight(
            f"{theirs}null_experts.mixture_weight", f"{ours}null_experts.mixture_weight", constant, 2, hidden
        )
        yield whole_weight(f"{theirs}null_experts.constant", f"{ours}null_experts.constant", constant, hidden)


def _experts(name: str, tensor: str, experts: int, rows: int, columns: int) -> Weight:
    """Return matrices (E, R, C) that are read and written one expert at a time."""
    shape = (experts, rows, columns)
    places = tuple(Place(number, number + 1, (number, 0, 0), (1, rows, columns)) for number in range(experts))
    return Weight(name, shape, tensor, shape, places)
