"""Null experts added at import: what the files hold, and what the model gives before any training."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from tests.convert.megatron import checkpoint_logits, hf_logits, tokens_of, weights_of
from tests.convert.models import MOE, save
from tests.convert.tool import refusal, run

TOP_4 = ("--top-k", "4")
TEXT = "the a of to in ship area circle return left water day word3 word7 word40 " * 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of each family that has experts, and a text."""
    root = tmp_path_factory.mktemp("models")
    for family in MOE:
        save(root / family, family)
    (root / "text").write_text(TEXT)
    return root


def imported(source: Path, target: Path, *options: str) -> Path:
    run("import", "--from", str(source), "--to", str(target), *options)
    return target / "iter_0000000"


def own_top_k(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text())["num_experts_per_tok"])


def test_no_null_experts_change_no_byte(models: Path, tmp_path: Path) -> None:
    plain = imported(models / "olmoe", tmp_path / "here")
    kept = {file.name: file.read_bytes() for file in plain.iterdir()}
    plain.parent.rename(tmp_path / "before")
    again = imported(models / "olmoe", tmp_path / "here", "--num-null-experts", "0", "--seed", "7")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == kept


@pytest.mark.parametrize("null_init", ["copy", "shared", "random"])
def test_the_rows_are_those_that_a_checkpoint_gets_later(models: Path, tmp_path: Path, null_init: str) -> None:
    wanted = ("--num-null-experts", "3", "--top-k", "3", "--null-init", null_init, "--seed", "4")
    at_import = weights_of(imported(models / "mixtral", tmp_path / "a", *wanted))
    plain = imported(models / "mixtral", tmp_path / "b")
    printed = run("set-null-experts", "--from", str(plain), "--to", str(tmp_path / "c"), *wanted)
    assert f"start a run with: checkpoint.load_weights={tmp_path / 'c' / 'iter_0000000'}" in printed
    assert (tmp_path / "c" / "huggingface" / "tokenizer.json").is_file()
    later = weights_of(tmp_path / "c" / "iter_0000000")
    assert at_import.keys() == later.keys() and any("null_weight" in name for name in later)
    for name, value in later.items():
        assert torch.equal(at_import[name], value), name


def test_plain_scores_keep_their_weights_at_import_and_later(models: Path, tmp_path: Path) -> None:
    """With slots for all of the 4 true and 2 null experts, the weights decide alone."""
    plain = imported(models / "olmoe", tmp_path / "plain")
    nulls = ("--num-null-experts", "2", "--top-k", "6")
    added = imported(models / "olmoe", tmp_path / "import", *nulls)
    printed = run("set-null-experts", "--from", str(plain), "--to", str(tmp_path / "later"), *nulls)
    assert "weights: all_true" in printed and "moe.router.normalize=all_true" in printed
    later, none = tmp_path / "later" / "iter_0000000", ("--num-null-experts", "0", "--top-k", "4")
    paths = [added, later]
    for name, source in (("all", plain), ("back", later)):
        run("set-null-experts", "--from", str(source), "--to", str(tmp_path / name), *none)
        paths.append(tmp_path / name / "iter_0000000")
    logits = [checkpoint_logits(path, tokens_of()) for path in paths]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("null_init", ["copy", "random"])
@pytest.mark.parametrize("family", MOE)
def test_a_preserved_output_is_transformers_own(models: Path, tmp_path: Path, family: str, null_init: str) -> None:
    k = own_top_k(models / family)
    path = imported(
        models / family,
        tmp_path / "out",
        *("--num-null-experts", "4", "--null-init", null_init, "--preserve-output", "--target-load", f"{k - 0.5}"),
    )
    moe = json.loads((path / "config.json").read_text())["moe"]
    assert moe["top_k"] == k and moe["router"]["target_load"] == k - 0.5
    for layer in range(2):
        bias = weights_of(path)[f"decoder.layers.{layer}.mlp.router.expert_bias"]
        assert torch.equal(bias, torch.ones(4))
    tokens = tokens_of()
    expected = hf_logits(models / family, tokens)
    torch.testing.assert_close(checkpoint_logits(path, tokens), expected, rtol=1e-4, atol=2e-5)
    lossy = imported(
        models / family,
        tmp_path / "lossy",
        *("--num-null-experts", "4", "--null-init", null_init, "--top-k", str(k), "--target-load", f"{k - 0.5}"),
    )
    assert (checkpoint_logits(lossy, tokens) - expected).abs().max() > 1e-3


def test_the_last_line_can_be_pasted(models: Path, tmp_path: Path) -> None:
    target, copy = tmp_path / "a b", tmp_path / "c d"
    printed = run("import", "--from", str(models / "olmoe"), "--to", str(target))
    words = shlex.split(printed.splitlines()[-1].removeprefix("start a run from it with: "))
    assert words == ["--config", str(target / "config.yaml"), "data.train=[{path: PREFIX}]"]
    printed = run("set-null-experts", "--from", str(target), "--to", str(copy), "--num-null-experts", "2", *TOP_4)
    words = shlex.split(printed.splitlines()[-1].removeprefix("start a run with: "))
    assert words[0] == f"checkpoint.load_weights={copy / 'iter_0000000'}" and "moe.top_k=4" in words


def test_the_load_report_counts_what_the_router_selects(models: Path, tmp_path: Path) -> None:
    """Against the scores of the first layer's router, which sees the embedding and the first attention only."""
    text = str(models / "text")
    preserved = run(
        *("import", "--from", str(models / "mixtral"), "--to", str(tmp_path / "a"), "--text", text),
        *("--num-null-experts", "4", "--preserve-output", "--target-load", "1.2"),
    )
    lines = [line.split() for line in preserved.splitlines()]
    assert [line[1:] for line in lines if line[0] in ("0", "1", "mean")] == [["2.000", "0.000", "0.000"]] * 3
    adapted = run(
        *("import", "--from", str(models / "mixtral"), "--to", str(tmp_path / "b"), "--text", text, "--text", text),
        *("--num-null-experts", "4", "--null-init", "random", "--top-k", "2"),
    )
    rows = {line.split()[0]: line.split()[1:] for line in adapted.splitlines() if line.startswith("   ")}
    loads = scored_by_hand(tmp_path / "b" / "iter_0000000", models / "mixtral")
    assert float(rows["0"][0]) == pytest.approx(sum(loads) / len(loads), abs=5e-3)
    assert float(rows["0"][1]) == pytest.approx(1 - sum(loads) / len(loads) / 2, abs=5e-3)
    assert float(rows["0"][2]) == pytest.approx(loads.count(0) / len(loads), abs=5e-3)
    assert 0 < loads.count(0) < len(loads)
    assert float(rows["mean"][0]) == pytest.approx((float(rows["0"][0]) + float(rows["1"][0])) / 2, abs=1e-3)


@torch.no_grad()
def scored_by_hand(checkpoint: Path, directory: Path) -> list[int]:
    """True experts of each token of the text at the first layer, from transformers' hidden states and our rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(directory)(TEXT, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for start in range(0, len(ids), 64):
        model(torch.tensor([ids[start : start + 64]]))
    weights = weights_of(checkpoint)
    rows = [weights[f"decoder.layers.0.mlp.router.{name}"] for name in ("weight", "null_weight")]
    chosen = (torch.cat(seen) @ torch.cat(rows).t()).topk(2).indices
    loads: list[int] = (chosen < 4).sum(dim=1).tolist()
    return loads


def test_contradictions_are_refused_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    run("import", "--from", str(models / "olmoe"), "--to", str(tmp_path / "first"), "--num-null-experts", "2", *TOP_4)
    run("export", "--from", str(tmp_path / "first"), "--to", str(tmp_path / "adamoe"))
    adamoe = ("--from", str(tmp_path / "adamoe"), "--to", str(tmp_path / "out"))
    already = f"the model of {tmp_path / 'adamoe'} has 2 null experts already"
    here = ("--from", str(models / "olmoe"), "--to", str(tmp_path / "out"))
    four = (*here, "--num-null-experts", "4")
    cases = {
        "--num-null-experts 4 needs --top-k K": four,
        "--preserve-output starts with all null experts shut out and needs --target-load L, below 3": (
            *four,
            "--preserve-output",
        ),
        "--top-k 5 with --preserve-output": (*four, "--preserve-output", "--target-load", "2", "--top-k", "5"),
        "moe.router.target_load=3 is not between": (*four, "--preserve-output", "--target-load", "3"),
        "--preserve-output says something of null experts": (*here, "--preserve-output"),
        "--target-load says": (*here, "--target-load", "2"),
        "--top-k says": (*here, "--top-k", "4"),
        "--num-null-experts M, or leave it out": (*here, "--null-init", "copy"),
        "--num-null-experts -1 must not be negative": (*here, "--num-null-experts", "-1"),
        "--num-null-experts 4 --top-k 9: moe.top_k=9 is more than the 8 experts": (*four, "--top-k", "9"),
        f"--text {tmp_path / 'no'} cannot be read": (*four, "--top-k", "4", "--text", str(tmp_path / "no")),
        f"--text {tmp_path / 'empty'} has no tokens": (*here, "--text", str(tmp_path / "empty")),
        f"--num-null-experts 4: {already}": (*adamoe, "--num-null-experts", "4", *TOP_4),
        f"--target-load: {already}": (*adamoe, "--target-load", "2"),
        "argument --seed: '-1' is not a whole number from 0 on": (*here, "--seed", "-1"),
        "argument --from: '' is not a path": ("--from", "", "--to", str(tmp_path / "out")),
        "argument --to: '' is not a path": ("--from", str(models / "olmoe"), "--to", ""),
    }
    for expected, arguments in cases.items():
        message = refusal("import", *arguments)
        assert expected in message and message.count("\n") == 1, message
        assert not list(tmp_path.glob("out*")), message
