"""Export and verify over the command line: what is refused, what is compared, what the directory holds."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from adamoe_dist import platform
from adamoe_dist.convert import Comparing
from tests.convert.models import build, save, save_deepseek, tensors_of
from tests.convert.tool import refusal, run

NULLS = ("--num-null-experts", "2", "--top-k", "3")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf``, of 100 ids, and ``imported`` from it; not to be changed."""
    root = tmp_path_factory.mktemp("kept")
    save(root / "hf", "mixtral")
    run("import", "--from", str(root / "hf"), "--to", str(root / "imported"))
    return root


@pytest.mark.parametrize(("rows", "said"), [("50", "100 rows"), ("101", "100 rows"), ("0", "at least 1")])
def test_the_vocabulary_cannot_be_cut_or_stretched(kept: Path, tmp_path: Path, rows: str, said: str) -> None:
    line = refusal("export", "--from", str(kept / "imported"), "--to", str(tmp_path / "out"), "--vocab-size", rows)
    assert f"--vocab-size {rows}" in line and said in line and not list(tmp_path.iterdir())
    run("export", "--from", str(kept / "imported"), "--to", str(tmp_path / "out"), "--vocab-size", "100")
    assert tensors_of(tmp_path / "out")["lm_head.weight"].shape[0] == 100


@pytest.mark.parametrize("way", ["import", "upcycle", "set-null-experts"])
def test_an_export_with_null_experts_is_verified_whatever_its_vocabulary(kept: Path, tmp_path: Path, way: str) -> None:
    """100 ids are padded to 128 rows, which AdaMoE's config.json names."""
    source, target = kept / "hf", tmp_path / "checkpoint"
    if way == "upcycle":
        source = tmp_path / "dense"
        save(source, "llama")
        run("upcycle", "--from", str(source), "--to", str(target), "--num-experts", "4", *NULLS)
    else:
        source = kept / ("hf" if way == "import" else "imported")
        run(way, "--from", str(source), "--to", str(target), *NULLS)
    run("export", "--from", str(target), "--to", str(tmp_path / "hf"))
    assert tensors_of(tmp_path / "hf")["lm_head.weight"].shape[0] == 128
    said = run("verify", "--hf", str(tmp_path / "hf"), "--megatron", str(target))
    assert "ok: the same model" in said


def test_verify_refuses_another_vocabulary(kept: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", "mixtral", vocab_size=104)
    line = refusal("verify", "--hf", str(tmp_path / "other"), "--megatron", str(kept / "imported"))
    assert "vocab_size is 104 there, 100 here" in line


def test_a_damaged_checkpoint_is_named_and_nothing_is_written(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "imported", tmp_path / "damaged")
    weights = next((tmp_path / "damaged" / "iter_0000000").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[content.index(tensors_of(kept / "hf")["lm_head.weight"].numpy().tobytes()[:64])] ^= 1
    weights.write_bytes(content)
    damage = f"{weights} was changed or damaged"
    assert damage in refusal("export", "--from", str(tmp_path / "damaged"), "--to", str(tmp_path / "out"))
    assert damage in refusal("verify", "--hf", str(kept / "hf"), "--megatron", str(tmp_path / "damaged"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


def test_numbers_beyond_fp16_are_refused_by_name(tmp_path: Path) -> None:
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = 70000.0
    model.save_pretrained(tmp_path / "hf")
    run("import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "imported"))
    line = refusal("export", "--from", str(tmp_path / "imported"), "--to", str(tmp_path / "out"), "--dtype", "fp16")
    assert "model.layers.1.self_attn.o_proj.weight has numbers up to 7e+04, which float16" in line and "bf16" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "imported"]
    run("export", "--from", str(tmp_path / "imported"), "--to", str(tmp_path / "out"), "--dtype", "bf16")


def test_only_the_files_of_the_import_come_back(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept / "imported", tmp_path / "imported")
    stray = tmp_path / "imported" / "huggingface"
    (stray / "notes").mkdir()
    (stray / "model.safetensors").write_bytes(b"not the weights")
    run("export", "--from", str(tmp_path / "imported"), "--to", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "notes").exists()
    assert tensors_of(tmp_path / "out").keys() == tensors_of(kept / "hf").keys()


def test_types_are_those_of_the_import_with_null_experts_too(tmp_path: Path) -> None:
    model = build("mixtral").to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.save_pretrained(tmp_path / "hf")
    run("import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "imported"), *NULLS, "--target-load", "1.2")
    run("export", "--from", str(tmp_path / "imported"), "--to", str(tmp_path / "out"))
    kinds = {name: value.dtype for name, value in tensors_of(tmp_path / "out").items()}
    wide = {name for name, kind in kinds.items() if kind != torch.bfloat16}
    assert wide == {"model.norm.weight", *(f"model.layers.{layer}.mlp.router.expert_bias" for layer in (0, 1))}
    assert any(name.endswith("router.null_weight") for name in kinds)


def test_verify_compares_tensors_only_where_logits_cannot_be_had(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ("--hf", str(kept / "hf"), "--megatron", str(kept / "imported"))
    monkeypatch.setattr(platform.host, "available_bytes", lambda: 1000)
    assert "0.00 GB are free; give --tensors-only" in refusal("verify", *pair)
    monkeypatch.setattr(Comparing, "compare_logits", None)
    assert "logits were not compared" in run("verify", *pair, "--tensors-only")
    save_deepseek(tmp_path / "hf")
    run("import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "imported"))
    pair = ("--hf", str(tmp_path / "hf"), "--megatron", str(tmp_path / "imported"))
    line = refusal("verify", *pair)
    assert "model_type=deepseek" in line and "--tensors-only" in line
    assert "logits were not compared" in run("verify", *pair, "--tensors-only")


@pytest.mark.parametrize("value", ["nan", "-1"])
def test_a_tolerance_that_is_none_is_refused(kept: Path, value: str) -> None:
    line = refusal("verify", "--hf", str(kept / "hf"), "--megatron", "nowhere", f"--tolerance={value}")
    assert "--tolerance" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_equal_numbers_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model = build("mixtral")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path / "hf")
    run("import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "imported"))
    line = refusal("verify", "--hf", str(tmp_path / "hf"), "--megatron", str(tmp_path / "imported"))
    assert "model.layers.1.self_attn.o_proj.weight holds numbers that are not finite" in line


@pytest.mark.parametrize("settings", [True, False])
def test_every_kept_file_comes_back_to_the_byte(tmp_path: Path, settings: bool) -> None:
    source, back = tmp_path / "hf", tmp_path / "back"
    save(source, "olmoe")
    (source / "additional_chat_templates").mkdir()
    names = ["spiece.model", "vocab.txt", "tekken.json", "tokenizer.model.v3", "additional_chat_templates/tool.jinja"]
    names += ["preprocessor_config.json", "USE_POLICY.md", "LICENSE", "chat_template.jinja", "README.md"]
    for name in names:
        (source / name).write_text(f'{{"of": "{name}"}}')
    if not settings:
        (source / "generation_config.json").unlink()
    (source / ".gitattributes").write_text("left")
    (source / "original").mkdir()
    said = run("import", "--from", str(source), "--to", str(tmp_path / "imported"))
    assert "note: not taken along: .gitattributes, original/\n" in said
    run("export", "--from", str(tmp_path / "imported"), "--to", str(back))
    files = {file.relative_to(source).as_posix(): file.read_bytes() for file in source.rglob("*") if file.is_file()}
    del files[".gitattributes"]
    files["README_original.md"] = files.pop("README.md")
    assert {file.relative_to(back).as_posix() for file in back.rglob("*") if file.is_file()} == {*files, "README.md"}
    for name, content in files.items():
        assert (back / name).read_bytes() == content, name
    assert "(README_original.md)" in (back / "README.md").read_text()
    run("import", "--from", str(back), "--to", str(tmp_path / "again"))
    run("export", "--from", str(tmp_path / "again"), "--to", str(tmp_path / "third"))
    assert (tmp_path / "third" / "README_original.md").read_bytes() == files["README_original.md"]


def test_a_tokenizer_without_an_end_is_exported(tmp_path: Path) -> None:
    save(tmp_path / "hf", "mixtral")
    (tmp_path / "hf" / "generation_config.json").unlink()
    settings = tmp_path / "hf" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": None}))
    for options, has_note in (((), False), (NULLS, True)):
        target = tmp_path / f"with{len(options)}"
        run("import", "--from", str(tmp_path / "hf"), "--to", str(target), *options)
        said = run("export", "--from", str(target), "--to", str(target / "hf"))
        assert ("note: generation_config.json lacks the ids of the tokenizer" in said) == has_note
        assert (target / "hf" / "tokenizer_config.json").read_bytes() == settings.read_bytes()
        assert (target / "hf" / "generation_config.json").exists() == has_note, "it names the rows that no token has"


def test_the_other_command_is_named(kept: Path, tmp_path: Path) -> None:
    to = ("--to", str(tmp_path / "out"))
    for place in (kept / "imported", kept / "imported" / "iter_0000000"):
        assert "the command export" in refusal("import", "--from", str(place), *to)
    assert "the command import" in refusal("export", "--from", str(kept / "hf"), *to)


def test_inspect_says_which_model_it_is(kept: Path, tmp_path: Path) -> None:
    said = run("inspect", "--from", str(kept / "hf"))
    for words in (
        "num_layers 2",
        "hidden_size 32",
        "heads 4",
        "groups 2",
        "num_experts 4",
        "top_k 2",
        "vocab_size 100",
    ):
        assert words in said, words
    assert "imported from a mixtral model" in run("inspect", "--from", str(kept / "imported"))
    save(tmp_path / "dense", "llama")
    said = run("inspect", "--from", str(tmp_path / "dense"))
    assert "command upcycle" in said and "num_experts" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(kept: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(kept / "hf", tmp_path / "hf")
    (tmp_path / "hf" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in refusal("import", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "out"))


def test_a_checkpoint_copied_alone_is_exported_without_its_origin(kept: Path, tmp_path: Path) -> None:
    run("import", "--from", str(kept / "hf"), "--to", str(tmp_path / "imported"))
    shutil.copytree(tmp_path / "imported" / "iter_0000000", tmp_path / "alone" / "iter_0000000")
    shutil.rmtree(tmp_path / "imported")
    said = run("export", "--from", str(tmp_path / "alone" / "iter_0000000"), "--to", str(tmp_path / "out"))
    assert "huggingface is missing" in said and "unknown origin" in said and "mixtral" in said
    assert tensors_of(tmp_path / "out").keys() == tensors_of(kept / "hf").keys()


def test_the_coefficient_of_the_balance_loss_is_not_dropped_silently(kept: Path, tmp_path: Path) -> None:
    said = run("import", "--from", str(kept / "hf"), "--to", str(tmp_path / "imported"))
    assert said.count("note: router_aux_loss_coef=0.001") == 1
