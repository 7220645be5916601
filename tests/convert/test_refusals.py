"""What is not converted: each in one line that names the file or key, nothing half-written."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamoe_dist.checkpoint import (
    WeightsWriter,
    check_compatible,
    plan_null_experts,
    read_config,
    read_index,
    read_tensor,
    set_null_experts,
)
from adamoe_dist.config import load_config
from adamoe_dist.convert import Comparing, export_model, import_model, plan_export, plan_import
from adamoe_dist.convert.commands import describe_hf_directory
from adamoe_dist.errors import UserError
from tests.convert import models

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "hf"
    models.save(directory, "mixtral", shard_size="20KB")
    return directory


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "hf"))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def without_config(source: Path) -> str:
    (source / "config.json").unlink()
    return "config.json is missing"


def unknown_family(source: Path) -> str:
    models.change_config(source, model_type="mamba")
    return "model_type='mamba'"


def other_class(source: Path) -> str:
    models.change_config(source, architectures=["MixtralForSequenceClassification"])
    return "architectures="


def unknown_key(source: Path) -> str:
    models.change_config(source, mixture_of_depths=3)
    return "mixture_of_depths=3"


def missing_size(source: Path) -> str:
    models.change_config(source, hidden_size=None)
    return "hidden_size is missing"


def other_class_as_text(source: Path) -> str:
    models.change_config(source, architectures="MixtralForCausalLM")
    return "architectures='MixtralForCausalLM'"


def class_as_number(source: Path) -> str:
    models.change_config(source, architectures=3)
    return "architectures=3"


def family_as_list(source: Path) -> str:
    models.change_config(source, model_type=["mixtral"])
    return "model_type=['mixtral']"


def more_layers_than_tensors(source: Path) -> str:
    models.change_config(source, num_hidden_layers=10**12)
    return "config.json: num_hidden_layers=1000000000000 is more than the 41 tensors"


def more_experts_than_tensors(source: Path) -> str:
    models.change_config(source, num_local_experts=10**12)
    return "config.json: num_local_experts=1000000000000 is more"


def heads_that_do_not_fit(source: Path) -> str:
    models.change_config(source, num_attention_heads=3, num_key_value_heads=3)
    return f"{source / 'config.json'} makes no model that can be had here: model.num_attention_heads=3"


def index_lost(source: Path) -> str:
    (source / INDEX).unlink()
    return f"{shards(source)[0].name} without {INDEX}"


def missing_shard(source: Path) -> str:
    shards(source)[1].unlink()
    return f"{shards(source)[0].name[:6]}00002"


def cut_shard(source: Path) -> str:
    file = shards(source)[1]
    file.write_bytes(file.read_bytes()[:-8])
    return file.name


def no_weights(source: Path) -> str:
    for file in (*shards(source), source / INDEX):
        file.unlink()
    return "neither"


def bin_only(source: Path) -> str:
    no_weights(source)
    torch.save({}, source / "pytorch_model.bin")
    return "pytorch_model.bin"


def absent_tensor(source: Path) -> str:
    content = json.loads((source / INDEX).read_text())
    content["weight_map"]["model.layers.7.input_layernorm.weight"] = shards(source)[0].name
    (source / INDEX).write_text(json.dumps(content))
    return "model.layers.7.input_layernorm.weight"


def unlisted_tensor(source: Path) -> str:
    content = json.loads((source / INDEX).read_text())
    content["weight_map"].pop("model.norm.weight")
    (source / INDEX).write_text(json.dumps(content))
    return "model.norm.weight"


def outside(source: Path) -> str:
    content = json.loads((source / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (source / INDEX).write_text(json.dumps(content))
    return "outside the directory"


def twice_in_the_index(source: Path) -> str:
    text = (source / INDEX).read_text()
    (source / INDEX).write_text(text.replace('"lm_head.weight":', '"model.norm.weight":'))
    return "stands there twice"


def with_tensor(name: str, value: torch.Tensor | None, said: str) -> Callable[[Path], str]:
    """Put a tensor in the place of one, add it, or take it out; the index says so too."""

    def change(source: Path) -> str:
        content = json.loads((source / INDEX).read_text())
        file = content["weight_map"].get(name, shards(source)[0].name)
        rewrite(
            source / file, lambda tensors: tensors.pop(name, None) if value is None else tensors.update({name: value})
        )
        content["weight_map"][name] = file
        if value is None:
            del content["weight_map"][name]
        (source / INDEX).write_text(json.dumps(content))
        return said

    change.__name__ = f"with_tensor {said}"
    return change


def large_tokenizer(source: Path) -> str:
    models.add_tokenizer(source, ids=models.VOCAB + 1)
    return "101 ids"


def broken_tokenizer(source: Path) -> str:
    (source / "tokenizer.json").write_text('{"added_tokens": [{"content": "<s>"}]}')
    return "its tokenizer's files"


ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
BAD = [
    without_config,
    unknown_family,
    other_class,
    unknown_key,
    missing_size,
    other_class_as_text,
    class_as_number,
    family_as_list,
    more_layers_than_tensors,
    more_experts_than_tensors,
    heads_that_do_not_fit,
    missing_shard,
    index_lost,
    cut_shard,
    no_weights,
    bin_only,
    absent_tensor,
    unlisted_tensor,
    outside,
    twice_in_the_index,
    with_tensor(ROUTER, torch.zeros(4, 31), "shape (4, 31)"),
    with_tensor(ROUTER, torch.zeros(4, 32, dtype=torch.float64), "F64"),
    with_tensor(ROUTER, torch.zeros(4, 32, dtype=torch.float8_e4m3fn), "F8_E4M3"),
    with_tensor(ROUTER, None, "is missing"),
    with_tensor("model.layers.0.block_sparse_moe.gate.bias", torch.zeros(4), "no tensor of a mixtral model"),
    large_tokenizer,
    broken_tokenizer,
]


@pytest.mark.parametrize("harm", BAD, ids=lambda harm: harm.__name__)
def test_a_bad_directory_is_refused_in_one_line(source: Path, harm: Callable[[Path], str]) -> None:
    said = harm(source)
    with pytest.raises(UserError) as refusal:
        plan_import(source)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    if harm not in (without_config, unknown_family, family_as_list):
        found = describe_hf_directory(source)["refused"] if harm not in UNREADABLE else []
        assert all(said in problem for problem in found) and len(found) == (harm not in UNREADABLE)


UNREADABLE = [
    index_lost,
    missing_shard,
    cut_shard,
    no_weights,
    bin_only,
    absent_tensor,
    unlisted_tensor,
    outside,
    twice_in_the_index,
]


def test_a_copy_of_a_tied_embedding(tmp_path: Path) -> None:
    """Equal it goes along and comes back; different it is refused."""
    models.save(tmp_path / "hf", "mixtral", tie_word_embeddings=True)
    file = tmp_path / "hf" / "model.safetensors"
    rewrite(file, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    import_model(plan_import(tmp_path / "hf"), tmp_path / "checkpoint")
    export_model(plan_export(str(tmp_path / "checkpoint")), tmp_path / "back")
    assert "lm_head.weight" in models.tensors_of(tmp_path / "back")
    rewrite(file, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        import_model(plan_import(tmp_path / "hf"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_embedding_larger_than_the_tokenizer_stays_as_large(source: Path, tmp_path: Path) -> None:
    checkpoint = import_model(plan_import(source, 64), tmp_path / "checkpoint")
    tree = read_config(checkpoint)
    assert tree["model"]["vocab_size"] == models.VOCAB and tree["model"]["vocab_size_multiple"] == 64
    export_model(plan_export(str(checkpoint)), tmp_path / "back")
    assert models.tensors_of(tmp_path / "back")["lm_head.weight"].shape[0] == models.VOCAB


def test_it_cannot_be_resumed_but_started_from(source: Path, tmp_path: Path) -> None:
    from adamoe_dist.data import Tokenizer

    checkpoint = import_model(plan_import(source), tmp_path / "out")
    config = load_config(tmp_path / "out" / "config.yaml")
    fingerprint = Tokenizer.load(config.data.tokenizer).fingerprint
    assert config.checkpoint.load_weights == str(tmp_path / "out")
    assert check_compatible(checkpoint, config.to_dict(), fingerprint, weights_only=True) == []
    with pytest.raises(UserError, match=r"weights only.*checkpoint\.load_weights="):
        check_compatible(checkpoint, config.to_dict(), fingerprint)
    with pytest.raises(UserError, match="fingerprint"):
        check_compatible(checkpoint, config.to_dict(), "another", weights_only=True)


def test_a_copy_with_null_experts_still_has_its_origin(source: Path, tmp_path: Path) -> None:
    checkpoint = import_model(plan_import(source), tmp_path / "out")
    copy = set_null_experts(checkpoint, tmp_path / "adaptive", plan_null_experts(checkpoint, 4, 3))
    plan = plan_export(str(copy))
    assert plan.family.model_type == "adamoe" and plan.origin is not None
    export_model(plan, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_run_from_an_import_whose_files_were_changed_is_not_exported_without_them(
    source: Path, tmp_path: Path
) -> None:
    checkpoint = import_model(plan_import(source), tmp_path / "out")
    config = load_config(tmp_path / "out" / "config.yaml").to_dict()
    (tmp_path / "run").mkdir()
    with WeightsWriter(tmp_path / "run") as writer:
        for key, entry in read_index(checkpoint).items():
            value = read_tensor(checkpoint, read_index(checkpoint), key)
            writer.add(key.removeprefix("model."), entry.shape, (0,) * value.dim(), value)
        writer.finish(config, None)
    assert plan_export(str(tmp_path / "run")).origin is not None
    kept = tmp_path / "out" / "huggingface" / "config.json"
    kept.write_text(kept.read_text() + " ")
    with pytest.raises(
        UserError, match=rf"started from {tmp_path / 'out'}.*config\.json is missing or was changed.*move"
    ):
        plan_export(str(tmp_path / "run"))
    (tmp_path / "out").rename(tmp_path / "away")
    assert plan_export(str(tmp_path / "run")).origin is None


def test_changed_files_and_weights_are_found(source: Path, tmp_path: Path) -> None:
    import_model(plan_import(source), tmp_path / "out")
    victim = shards(source)[-1]
    name = next(iter(load_file(victim)))
    rewrite(victim, lambda tensors: tensors[name].view(-1)[3].add_(0.5))
    with pytest.raises(UserError, match=rf"1 of 41 tensors differ, {name} most: by 0\.5"):
        Comparing(source, str(tmp_path / "out")).compare_tensors()
    models.change_config(source, rms_norm_eps=1e-3)
    with pytest.raises(UserError, match=r"model\.norm_epsilon is 0\.001 there"):
        Comparing(source, str(tmp_path / "out"))
    (tmp_path / "out" / "huggingface" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing or was changed"):
        plan_export(str(tmp_path / "out"))


@pytest.mark.end_to_end
def test_the_commands(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import, look, compare, give back, and one refusal: codes and words."""
    monkeypatch.chdir(tmp_path)
    tool = runpy.run_path(str(TOOL))["main"]

    def said(*arguments: object) -> str:
        tool([str(argument) for argument in arguments])
        return capsys.readouterr().out

    assert "mixtral" in said("import", "--from", source, "--to", "out")
    assert "ok: every file" in said("inspect", "--from", "out", "--verify")
    assert "ok: the same model" in said("verify", "--hf", source, "--megatron", "out")
    assert "bytes of weights" in said("export", "--from", "out", "--to", "back", "--dtype", "bf16")
    assert "bytes of weights in 1 files" in said("export", "--from", "out", "--to", "one", "--max-shard-size", "1GB")
    seen = said("inspect", "--from", "back")
    assert "tensors: 41 (BF16 41)" in seen and "cannot" not in seen
    assert json.loads(said("inspect", "--from", "one", "--json"))["refused"] == []
    with pytest.raises(UserError, match="--license '' is to stand in one line"):
        tool(["export", "--from", "out", "--to", "other", "--license", ""])
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="--text empty has no tokens"):
        tool(["verify", "--hf", str(source), "--megatron", "out", "--text", "empty"])
    refused = subprocess.run(
        [sys.executable, TOOL, "import", "--from", source, "--to", "out"], capture_output=True, text=True, cwd=tmp_path
    )
    lines = [
        line for line in refused.stderr.splitlines() if "cpp_extension" not in line
    ]  # torch's, for CUDA without GPU
    assert refused.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: --to out")


def test_sizes_that_no_model_has(source: Path) -> None:
    models.change_config(source, num_attention_heads=5, head_dim=None, num_key_value_heads=5)
    with pytest.raises(UserError, match=r"model\.num_attention_heads=5 does not divide model\.hidden_size=32"):
        plan_import(source)
