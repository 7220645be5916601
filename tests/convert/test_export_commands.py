"""Export and verify over the command line: what is refused, what is compared, what the directory holds."""

from pathlib import Path

import pytest

from tests.convert.models import save, tensors_of
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
