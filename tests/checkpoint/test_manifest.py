"""The manifest finds what was changed, and says which file."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from adamoe_dist.checkpoint import read_config, read_manifest, read_state, verify_files
from adamoe_dist.errors import UserError
from tests.checkpoint.conftest import Make


def test_content(make: Make) -> None:
    path = make(12)
    manifest = read_manifest(path)
    assert manifest["format_version"] == 1 and manifest["step"] == 12
    assert manifest["layout"] == {"world_size": 1}
    assert manifest["versions"].keys() == {"adamoe_dist", "python", "torch", "deepspeed", "megatron-core"}
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert manifest["files"].keys() == {"__0_0.distcp", "config.json", "state.json"}
    assert manifest["files"]["__0_0.distcp"]["bytes"] == 200
    assert read_state(path)["step"] == 12
    assert read_config(path)["model"]["hidden_size"] == 128
    verify_files(path)


def test_changed_content_of_the_same_size(make: Make) -> None:
    path = make(1)
    (path / "__0_0.distcp").write_bytes(bytes(200))
    with pytest.raises(UserError, match=r"__0_0\.distcp was changed or damaged .*sha256"):
        verify_files(path)
    verify_files(path, ["state.json"])


def test_changed_size(make: Make) -> None:
    path = make(1)
    (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"is incomplete: .*state\.json has 2 bytes instead of"):
        verify_files(path)


def test_missing_file(make: Make) -> None:
    path = make(1)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing"):
        verify_files(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "cannot be read"),
        ("[]", "does not hold a JSON object"),
        ('{"format_version": 2}', r"format_version 2 cannot be read \(this program reads 1\)"),
    ],
)
def test_unreadable_manifest(make: Make, content: str | None, message: str) -> None:
    manifest = make(1) / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(UserError, match=f"manifest.json.*{message}") as caught:
        read_manifest(manifest.parent)
    assert "\n" not in str(caught.value)


def test_damaged_list_of_files(make: Make) -> None:
    path: Path = make(1)
    content = json.loads((path / "manifest.json").read_text())
    content["files"] = {"__0_0.distcp": 200}
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json has no list of files with sizes and hashes"):
        verify_files(path)
