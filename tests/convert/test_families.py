"""Every family: there and back without a bit changed, and the same logits as transformers' own class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adamoe_dist.checkpoint import verify_files
from adamoe_dist.convert import (
    FAMILIES,
    Comparing,
    HFDirectory,
    choose_family,
    export_model,
    import_model,
    meaning,
    megatron_model,
    plan_export,
    plan_import,
)
from adamoe_dist.errors import UserError
from tests.convert import deepseek, models

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, wide heads, tied": ("mixtral", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, a dense layer, plain scores": ("qwen3_moe", {"mlp_only_layers": [0], "norm_topk_prob": False}),
    "qwen3_moe, every other layer": ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "olmoe": ("olmoe", {}),
    "olmoe, as many keys, normalised": ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, no biases, tied": ("qwen2_moe", {"qkv_bias": False, "tie_word_embeddings": True}),
}


def there_and_back(source: Path, root: Path) -> tuple[Path, Path]:
    checkpoint = import_model(plan_import(source), root / "checkpoint")
    verify_files(checkpoint)
    export_model(plan_export(str(root / "checkpoint")), root / "back")
    return checkpoint, root / "back"


def assert_same_directory(back: Path, source: Path) -> None:
    theirs, ours = models.tensors_of(source), models.tensors_of(back)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert {file.name for file in back.iterdir()} == {file.name for file in source.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_and_logits(tmp_path: Path, case: str) -> None:
    family, changes = CASES[case]
    models.save(tmp_path / "hf", family, **changes)
    _, back = there_and_back(tmp_path / "hf", tmp_path)
    assert_same_directory(back, tmp_path / "hf")
    pair = Comparing(tmp_path / "hf", str(tmp_path / "checkpoint"))
    assert pair.compare_tensors() > 20
    _, tokens, largest, mean = pair.compare_logits(None, 1e-4)
    assert tokens > 50 and mean <= largest < 1e-5


@pytest.mark.parametrize("family", models.MOE)
def test_bf16_in_shards(tmp_path: Path, family: str) -> None:
    models.save(tmp_path / "hf", family, torch.bfloat16, shard_size="20KB", tie_word_embeddings=family == "mixtral")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    _, back = there_and_back(tmp_path / "hf", tmp_path)
    assert_same_directory(back, tmp_path / "hf")
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((path / index).read_text()) for path in (back, tmp_path / "hf"))
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_deepseek_is_the_plain_computation(tmp_path: Path) -> None:
    tensors = models.save_deepseek(tmp_path / "hf")
    _, back = there_and_back(tmp_path / "hf", tmp_path)
    kept = {name for name in tensors if not name.endswith("inv_freq")}
    ours = models.tensors_of(back)
    assert ours.keys() == kept and all(torch.equal(ours[name], tensors[name]) for name in kept)
    assert (back / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    tokens = torch.randint(models.VOCAB, (40,), generator=torch.Generator().manual_seed(0))
    expected = deepseek.logits({name: value.double() for name, value in tensors.items()}, models.DEEPSEEK, tokens)
    with megatron_model(tmp_path / "checkpoint" / "iter_0000000", models.VOCAB) as model, torch.no_grad():
        got = model.logits(tokens[None])[0, :, : models.VOCAB].double()
    assert (got - expected).abs().max() < 1e-4
    pair = Comparing(tmp_path / "hf", str(tmp_path / "checkpoint"))
    assert pair.compare_tensors() == len(kept) and not pair.has_class()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_dense_tables_fit_the_files_but_are_not_imported(tmp_path: Path, family: str) -> None:
    model = models.save(tmp_path / "hf", family)
    directory = HFDirectory(tmp_path / "hf")
    config = directory.architecture.config()
    assert {weight.name for weight in directory.weights(config)} == set(models.tensors_of(tmp_path / "hf"))
    assert config.model.ffn_hidden_size == model.config.intermediate_size and config.moe_layers == []
    with pytest.raises(UserError, match=r"dense model .* upcycle"):
        plan_import(tmp_path / "hf")


@pytest.mark.parametrize("family", [*models.MOE, "llama", "mistral", "qwen3"])
def test_a_missing_key_means_what_the_class_means(family: str) -> None:
    """A config.json with sizes only, and the one that the class makes of it."""
    from transformers import AutoConfig

    sizes = {**models.COMMON, **models.SIZES[family], "model_type": family}
    whole = AutoConfig.for_model(**sizes).to_dict()
    own = FAMILIES[family]
    assert meaning(own.read(sizes).config()) == meaning(own.read(whole).config())


@pytest.mark.parametrize("family", [*models.SIZES, "deepseek"])
def test_what_is_written_says_what_was_read(family: str) -> None:
    own = FAMILIES[family]
    values = models.DEEPSEEK if family == "deepseek" else {**models.COMMON, **models.SIZES[family]}
    config = own.read(values).config()
    assert own.inexpressible(config, models.VOCAB) == []
    config.moe.num_null_experts = 2
    assert own.inexpressible(config, models.VOCAB) == ["moe.num_null_experts=2"]
    with pytest.raises(UserError, match=rf"--family {family} has no such model \({family}: moe\.num_null_experts=2\)"):
        choose_family(config, models.VOCAB, name=family)
    if family in models.MOE:
        from transformers import AutoConfig

        config.moe.num_null_experts = 0
        written = AutoConfig.for_model(**own.write(config, models.VOCAB)).to_dict()
        assert meaning(own.read(written).config()) == meaning(config)
