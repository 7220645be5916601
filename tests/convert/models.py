"""Small models of every family with random weights, as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB = 100
README = Path(__file__).parents[2] / "README.md"
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 3, "eos_token_id": 2},
    "qwen2_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama": {"intermediate_size": 64},
    "mistral": {"intermediate_size": 64, "sliding_window": None, "head_dim": 16},
    "qwen3": {"intermediate_size": 64, "head_dim": 16},
}
DEEPSEEK: dict[str, Any] = dict(
    COMMON,
    model_type="deepseek",
    architectures=["DeepseekForCausalLM"],
    auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
    attention_bias=False,
    aux_loss_alpha=0.001,
    seq_aux=True,
    first_k_dense_replace=1,
    hidden_act="silu",
    intermediate_size=64,
    moe_intermediate_size=24,
    moe_layer_freq=1,
    n_routed_experts=4,
    n_shared_experts=2,
    norm_topk_prob=False,
    num_experts_per_tok=2,
    num_key_value_heads=4,
    pretraining_tp=1,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000,
    scoring_func="softmax",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
MOE = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe")


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers' own class; norms and biases are not at their plain initial values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **SIZES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    draws = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=draws) * scale)
    return model


def save(
    directory: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    tokenizer: bool = True,
    **changes: Any,
) -> Any:
    """Save a model with files beside it; return it."""
    model = build(family, **changes).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    if tokenizer:
        add_tokenizer(directory)
    return model


def add_tokenizer(directory: Path, ids: int = 90) -> None:
    """A tokenizer of pairs that were merged in the README, in small letters, with three special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=ids, special_tokens=special, limit_alphabet=50, show_progress=False)
    tokenizer.train([str(README)], trainer)
    assert tokenizer.get_vocab_size() == ids
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor in a directory's safetensors files."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def change_config(directory: Path, **values: Any) -> None:
    """Set keys of a directory's config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def save_deepseek(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Tensor]:
    """DeepSeek-MoE in its own layout; return its tensors."""
    from safetensors.torch import save_file

    values = {**DEEPSEEK, **changes}
    hidden, inner = values["hidden_size"], values["moe_intermediate_size"]
    draws = torch.Generator().manual_seed(3)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draws) * (0.1 if len(shape) > 1 else 0.3)).to(dtype)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden), "lm_head.weight": matrix(VOCAB, hidden)}
    tensors["model.norm.weight"] = 1 + matrix(hidden)
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + matrix(hidden)
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(hidden, hidden)
        tensors[f"{prefix}self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        parts = {"": values["intermediate_size"]}
        if layer >= values["first_k_dense_replace"]:
            parts = {f"experts.{expert}.": inner for expert in range(values["n_routed_experts"])}
            parts["shared_experts."] = values["n_shared_experts"] * inner
            tensors[f"{prefix}mlp.gate.weight"] = matrix(values["n_routed_experts"], hidden)
        for part, width in parts.items():
            for name in ("gate", "up"):
                tensors[f"{prefix}mlp.{part}{name}_proj.weight"] = matrix(width, hidden)
            tensors[f"{prefix}mlp.{part}down_proj.weight"] = matrix(hidden, width)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    return tensors
