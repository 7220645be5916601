"""What a checkpoint holds, as the tool says it."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from adamoe_dist.checkpoint import checkpoint_at, describe_checkpoint
from adamoe_dist.errors import UserError
from tests.checkpoint.small import make_checkpoint, tree_of, weights_of


def test_contents(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, {"moe": {"num_null_experts": 4}})
    weights = weights_of(tree_of({"moe": {"num_null_experts": 4}}))
    contents = describe_checkpoint(path)
    assert contents["step"] == 3 and contents["tokens_seen"] == 77 and contents["layout"] == {"world_size": 1}
    assert contents["parameters"] == sum(value.numel() for key, value in weights.items() if key.startswith("model."))
    assert {key: tuple(tensor["shape"]) for key, tensor in contents["tensors"].items()} == {
        key: tuple(value.shape) for key, value in weights.items()
    }
    assert contents["tensors"]["optimizer.step"] == {"shape": [1], "dtype": "int64"}
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.name != "manifest.json"}
    assert contents["files"] == sizes and contents["bytes"] == sum(sizes.values())
    assert contents["model"]["moe.num_experts"] == 4 and contents["model"]["moe.num_null_experts"] == 4
    json.dumps(contents)


def test_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path / "run" / "checkpoints")
    for place in (path, path.parent, tmp_path / "run"):
        assert checkpoint_at(str(place), "--from") == path
    monkeypatch.chdir(path)
    assert checkpoint_at(".", "--from") == path
    monkeypatch.chdir(tmp_path)
    for name in ("auto", "none", "absent"):
        with pytest.raises(UserError, match=f"--from=.*{name} is not a directory"):
            checkpoint_at(name, "--from")


def test_inspect(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_checkpoint(tmp_path / "checkpoints", {"moe": {"num_null_experts": 4}})
    contents = describe_checkpoint(path)

    def inspected(*options: str) -> str:
        tool.main(["inspect", "--from", str(tmp_path / "checkpoints"), *options])
        return capsys.readouterr().out

    text, whole = inspected("--verify"), inspected("--tensors")
    assert text.startswith(f"{path}: step 3, 77 tokens seen, saved 20")
    assert "moe.num_experts 4, moe.num_null_experts 4, moe.top_k 2" in text
    assert f"tensors: {len(contents['tensors'])}, parameters: {contents['parameters']}" in text
    assert f"... and {len(contents['tensors']) - 12} more (--tensors)" in text and "..." not in whole
    assert text.splitlines()[-1].startswith("ok: ") and "ok: " not in whole
    for name, tensor in contents["tensors"].items():
        assert any(
            line.split()[0] == name and line.endswith(str(tuple(tensor["shape"]))) for line in whole.splitlines()
        )
    described = contents | {"imported_from": None}
    assert json.loads(inspected("--json")) == described
    assert json.loads(inspected("--json", "--verify")) == described | {"verified": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("divide --from x", "invalid choice: 'divide'"),
        ("inspect", "the following arguments are required: --from"),
        ("inspect --from absent", "--from=.*absent is not a directory"),
        ("set-null-experts --from x --to y --num-null-experts few --top-k 2", "invalid int value: 'few'"),
    ],
)
def test_refused_command_lines(tool: ModuleType, arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tool.main(arguments.split())
