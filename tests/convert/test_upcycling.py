"""Experts made of a dense model, against the dense model in transformers' own class."""

from pathlib import Path

import pytest
import torch

from adamoe_dist.checkpoint import read_config
from adamoe_dist.config import config_from_dict
from tests.convert.megatron import checkpoint_logits, hf_logits, tokens_of, weights_of
from tests.convert.models import add_tokenizer, save
from tests.convert.tool import refusal, run

DENSE = ("llama", "mistral", "qwen3")
WIDTH = 64


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of each dense family."""
    root = tmp_path_factory.mktemp("dense")
    for family in DENSE:
        save(root / family, family)
    return root


def upcycled(source: Path, target: Path, *options: str) -> tuple[Path, str]:
    printed = run("upcycle", "--from", str(source), "--to", str(target), *options)
    return target / "iter_0000000", printed


def reference_of(path: Path) -> int:
    return config_from_dict(read_config(path)).reference_top_k


@pytest.mark.parametrize("family", DENSE)
def test_whole_copies_give_the_dense_models_output(dense: Path, tmp_path: Path, family: str) -> None:
    path, printed = upcycled(dense / family, tmp_path / "moe", "--num-experts", "4")
    assert "output before training: the dense model's\n" in printed
    tokens = tokens_of()
    expected = hf_logits(dense / family, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(checkpoint_logits(path, tokens), expected, rtol=1e-4, atol=1e-5)
    router = weights_of(path)["decoder.layers.0.mlp.router.weight"]
    assert router.shape == (4, 32) and 0.01 < router.std() < 0.03


@pytest.mark.parametrize(
    ("options", "is_dense"),
    [
        (["--num-experts", "8", "--top-k", "4"], True),
        (["--num-experts", "8", "--top-k", "8"], True),
        (["--num-experts", "8", "--top-k", "2"], False),
        (["--num-experts", "4", "--top-k", "4", "--num-null-experts", "2"], False),
        (["--num-experts", "8", "--top-k", "4", "--num-null-experts", "2", "--preserve-output"], True),
    ],
    ids=["one copy", "two copies", "half a copy", "null experts", "null experts shut out"],
)
def test_pieces_give_the_output_where_tokens_select_whole_copies(
    dense: Path, tmp_path: Path, options: list[str], is_dense: bool
) -> None:
    """A copy's four pieces score alike, and their outputs are scaled so that weights of 1/4 add them up."""
    load = ["--target-load", "3"] if "--preserve-output" in options else []
    path, printed = upcycled(dense / "llama", tmp_path / "moe", "--expert-hidden-size", "16", *options, *load)
    assert f"output before training: {'' if is_dense else 'not '}the dense model's" in printed
    tokens = tokens_of()
    gap = (checkpoint_logits(path, tokens) - hf_logits(dense / "llama", tokens)).abs().max()
    assert (gap < 1e-4) == is_dense and (gap < 1e-4 or gap > 1e-2), gap
    weights = weights_of(path)
    down = weights["decoder.layers.1.mlp.experts.weight2"]
    rows = weights["decoder.layers.1.mlp.router.weight"]
    assert torch.equal(rows[0], rows[3]) and (len(rows) == 4 or not torch.equal(rows[0], rows[4]))
    assert not torch.equal(down[0], down[1]) and (len(down) == 4 or torch.equal(down[1], down[5]))


def test_null_experts_beside_copies_cost_output_only_where_a_token_has_no_copy(dense: Path, tmp_path: Path) -> None:
    tokens = tokens_of()
    expected = hf_logits(dense / "llama", tokens)
    always, printed = upcycled(
        dense / "llama", tmp_path / "a", "--num-experts", "4", "--num-null-experts", "2", "--top-k", "3"
    )
    assert "output before training: the dense model's\n" in printed
    torch.testing.assert_close(checkpoint_logits(always, tokens), expected, rtol=1e-4, atol=1e-5)
    seldom, printed = upcycled(
        dense / "llama", tmp_path / "b", "--num-experts", "4", "--num-null-experts", "12", "--top-k", "2"
    )
    assert "but for tokens that take null experts only" in printed
    assert (checkpoint_logits(seldom, tokens) - expected).abs().max() > 1e-2
    assert reference_of(always) == reference_of(seldom) == 2


def test_the_saving_of_null_experts_shut_out_is_counted_from_the_models_own_top_k(dense: Path, tmp_path: Path) -> None:
    nulls = ["--num-null-experts", "2", "--target-load", "2", "--preserve-output"]
    kept, _ = upcycled(dense / "llama", tmp_path / "a", "--num-experts", "4", "--top-k", "3", *nulls)
    assert reference_of(kept) == 3


def test_noise_sets_experts_apart_and_follows_the_seed(dense: Path, tmp_path: Path) -> None:
    plain = weights_of(upcycled(dense / "llama", tmp_path / "plain", "--num-experts", "3")[0])
    noisy, again, other = (
        weights_of(
            upcycled(dense / "llama", tmp_path / name, "--num-experts", "3", "--noise", "0.1", "--seed", seed)[0]
        )
        for name, seed in (("noisy", "5"), ("again", "5"), ("other", "6"))
    )
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    for name, value in plain.items():
        is_drawn = ".experts." in name
        is_router = name.endswith("router.weight")
        assert torch.equal(value, noisy[name]) != (is_drawn or is_router), name
        assert torch.equal(noisy[name], other[name]) != (is_drawn or is_router), name
        if not is_drawn:
            continue
        assert torch.equal(value[0], value[1]) and not torch.equal(noisy[name][0], noisy[name][1])
        for matrix, exact in zip(noisy[name].chunk(2, dim=1), value.chunk(2, dim=1), strict=True):
            assert (matrix - exact).std() / exact.std() == pytest.approx(0.1, rel=0.2), name


def test_what_cannot_be_upcycled_is_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    save(tmp_path / "mixtral", "mixtral")
    target = str(tmp_path / "out")
    (tmp_path / "empty").write_text("")
    llama, mixtral = ("--from", str(dense / "llama"), "--to", target), ("--from", str(tmp_path / "mixtral"))
    bad_tokenizer = tmp_path / "tokens"
    save(bad_tokenizer, "llama", tokenizer=False)
    add_tokenizer(bad_tokenizer, ids=120)
    cases = {
        "has experts already (mixtral); use the command import": (*mixtral, "--to", target, "--num-experts", "4"),
        "--expert-hidden-size 24 does not divide": (*llama, "--num-experts", "4", "--expert-hidden-size", "24"),
        "--num-experts 6 is no multiple of the 4 pieces": (
            *llama,
            *("--num-experts", "6", "--expert-hidden-size", "16"),
        ),
        "moe.top_k=5 is more than the 4 experts": (*llama, "--num-experts", "4", "--top-k", "5"),
        "--noise -1.0 must be between 0 and 1": (*llama, "--num-experts", "4", "--noise", "-1"),
        "--noise nan must be": (*llama, "--num-experts", "4", "--noise", "nan"),
        "--noise inf must be": (*llama, "--num-experts", "4", "--noise", "inf"),
        "--noise 1e+30 must be": (*llama, "--num-experts", "4", "--noise", "1e30"),
        "--expert-hidden-size 0 does not divide": (*llama, "--num-experts", "4", "--expert-hidden-size", "0"),
        "--expert-hidden-size -16 does not divide": (*llama, "--num-experts", "4", "--expert-hidden-size", "-16"),
        "argument --seed: '-1'": (*llama, "--num-experts", "4", "--seed", "-1"),
        f"--text {tmp_path / 'empty'} has no tokens": (
            *llama,
            *("--num-experts", "4", "--text", str(tmp_path / "empty")),
        ),
        "the tokenizer has 120 ids": ("--from", str(bad_tokenizer), "--to", target, "--num-experts", "2"),
        "--text": (*llama, "--num-experts", "4", "--text", str(tmp_path / "nothing.txt")),
    }
    for expected, arguments in cases.items():
        message = refusal("upcycle", *arguments)
        assert expected in message and message.count("\n") == 1, message
        assert not list(tmp_path.glob("out*")), message
