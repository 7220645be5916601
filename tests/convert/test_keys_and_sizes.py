"""What keys of a ``config.json`` mean, which of them are refused, and sizes of files as options name them."""

import math
from typing import Any

import pytest

from adamoe_dist.convert import HFConfig, family_of
from adamoe_dist.convert.commands import size_in_bytes
from adamoe_dist.errors import UserError
from tests.convert import models

KEYS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": 32}),
    ("mixtral", {"hidden_act": "gelu"}),
    ("mixtral", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("mixtral", {"rope_parameters": None, "rope_theta": 10000.5}),
    ("mixtral", {"rope_parameters": None, "rope_theta": math.inf}),
    ("mixtral", {"rope_parameters": None, "rope_theta": math.nan}),
    ("mixtral", {"rope_parameters": None, "rope_theta": 10**400}),
    ("mixtral", {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}}),
    ("mixtral", {"rms_norm_eps": math.nan}),
    ("mixtral", {"sliding_window": 32.5}),
    ("mixtral", {"quantization_config": {"quant_method": "gptq"}}),
    ("mixtral", {"num_local_experts": "eight"}),
    ("olmoe", {"clip_qkv": 8.0}),
    ("olmoe", {"attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
    ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}),
    ("deepseek", {"routed_scaling_factor": 2.5}),
    ("deepseek", {"scoring_func": "sigmoid"}),
    ("deepseek", {"n_group": 8}),
    ("deepseek", {"q_lora_rank": 64}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"rope_interleaved": True}),
    ("adamoe", {"router_aux_loss_coef": "x"}),
    ("adamoe", {"num_null_experts": "x"}),
    ("adamoe", {"normalize": "x"}),
    ("adamoe", {"target_load": math.nan}),
    ("llama", {"pretraining_tp": 2}),
    ("mistral", {"sliding_window": 16}),
]


@pytest.mark.parametrize(("family", "changes"), KEYS)
def test_a_key_that_means_another_model_is_refused_by_name(family: str, changes: dict[str, Any]) -> None:
    sizes = models.DEEPSEEK if family == "deepseek" else models.SIZES["qwen3_moe" if family == "adamoe" else family]
    values = {**models.COMMON, **sizes}
    if family == "adamoe":
        del values["norm_topk_prob"]
    values = {**values, "model_type": family}
    family_of(values).read(values)
    name, value = list(changes.items())[-1]
    with pytest.raises(UserError) as refusal:
        family_of(values).read({**values, **changes})
    assert f"{name}={value!r}" in str(refusal.value)


def test_keys_that_say_nothing_here() -> None:
    """Of a published Llama, and a window that is written as a float."""
    values = {**models.COMMON, **models.SIZES["llama"], "model_type": "llama"}
    plain = family_of(values).read(values)
    assert family_of(values).read({**values, "is_llama_config": True, "rope_interleaved": False}) == plain
    values = {**models.COMMON, **models.SIZES["mistral"], "model_type": "mistral"}
    assert family_of(values).read({**values, "sliding_window": 4096.0}) == family_of(values).read(values)


def test_both_forms_of_the_rotary_base_and_noise() -> None:
    old = HFConfig({"rope_theta": 5e5, "rope_scaling": None, "attention_dropout": 0.1, "router_jitter_noise": 0.2})
    assert old.rotary_base(1.0) == 500000
    new = HFConfig({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert new.rotary_base(1.0) == 500000 and HFConfig({}).rotary_base(1e4) == 10000
    old.finish("mixtral", "MixtralForCausalLM")
    assert [note.split("=")[0] for note in old.notes] == ["attention_dropout", "router_jitter_noise"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("2 MiB", 2**21),
        ("1.5kb", 1500),
        ("700", 700),
        ("5G", 5 * 10**9),
        ("2TB", 2 * 10**12),
        ("1e9", 10**9),
        ("0", 0),
        ("big", 0),
        ("9" * 400, 0),
        ("1e999", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    if size:
        assert size_in_bytes(text) == size
    else:
        with pytest.raises(UserError, match="--max-shard-size"):
            size_in_bytes(text)
