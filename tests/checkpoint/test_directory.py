"""Which checkpoint a run continues from, and which are kept."""

from pathlib import Path

import pytest

from adamoe_dist.checkpoint import find_checkpoint, has_checkpoints, remove_leftovers
from adamoe_dist.checkpoint.directory import POINTER, Retention, publish, remove_older
from adamoe_dist.errors import UserError
from tests.checkpoint.conftest import Make


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_nothing_there(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path / "absent") is None
    assert find_checkpoint("none", tmp_path) is None
    assert not has_checkpoints(tmp_path / "absent")
    (tmp_path / "iter_0000001.tmp").mkdir()
    assert not has_checkpoints(tmp_path)
    assert find_checkpoint("auto", tmp_path) is None


def test_pointer_decides(tmp_path: Path, make: Make) -> None:
    make(1)
    make(2)
    (tmp_path / POINTER).write_text("1\n")
    assert find_checkpoint("auto", tmp_path) == tmp_path / "iter_0000001"
    assert find_checkpoint("none", tmp_path) is None
    assert has_checkpoints(tmp_path)


@pytest.mark.parametrize("pointer", [None, "7", "", "release", "²"])
def test_newest_complete_without_a_usable_pointer(tmp_path: Path, make: Make, pointer: str | None) -> None:
    make(9)
    make(10_000_000)
    if pointer is not None:
        (tmp_path / POINTER).write_text(pointer)
    assert find_checkpoint("auto", tmp_path) == tmp_path / "iter_10000000"


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest", "no manifest"])
def test_incomplete_one_is_passed_over(tmp_path: Path, make: Make, harm: str) -> None:
    make(1)
    damaged = make(2)
    (tmp_path / POINTER).write_text("2")
    if harm == "truncate":
        (damaged / "__0_0.distcp").write_bytes(b"short")
    elif harm == "remove":
        (damaged / "__0_0.distcp").unlink()
    elif harm == "manifest":
        (damaged / "manifest.json").write_text("{")
    else:
        (damaged / "manifest.json").unlink()
    assert find_checkpoint("auto", tmp_path) == tmp_path / "iter_0000001"
    with pytest.raises(UserError, match=r"checkpoint\.resume=.*iter_0000002 is not a complete checkpoint") as caught:
        find_checkpoint(str(damaged), tmp_path)
    assert "\n" not in str(caught.value)


def test_paths(tmp_path: Path, make: Make) -> None:
    path = make(3, tmp_path / "run" / "checkpoints")
    elsewhere = tmp_path / "elsewhere"
    for value in (path, path.parent, path.parent.parent):
        assert find_checkpoint(str(value), elsewhere) == path


def test_refused_paths(tmp_path: Path, make: Make) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.load_weights=.*absent is not a directory"):
        find_checkpoint(str(tmp_path / "absent"), tmp_path, key="checkpoint.load_weights")
    with pytest.raises(UserError, match=r"checkpoint\.resume=n+ cannot be read \(File name too long\)"):
        find_checkpoint("n" * 256, tmp_path)
    with pytest.raises(UserError, match=r"has no complete checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)
    unfinished = make(4, name="iter_0000004.tmp")
    with pytest.raises(
        UserError, match=r"iter_0000004\.tmp is not a complete checkpoint \(its saving did not finish\)"
    ):
        find_checkpoint(str(unfinished), tmp_path)


def test_a_hugging_face_directory_is_to_be_imported(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"load_weights=.* is a Hugging Face directory; .*convert_checkpoint.py import"):
        find_checkpoint(str(tmp_path), Path(), key="checkpoint.load_weights")


def test_publish_replaces_and_points(tmp_path: Path, make: Make) -> None:
    old = make(5)
    (old / "extra").write_text("of the old one")
    assert publish(make(5, name="iter_0000005.tmp"), tmp_path, 5) == tmp_path / "iter_0000005"
    assert names(tmp_path) == ["iter_0000005", POINTER]
    assert (tmp_path / POINTER).read_text() == "5"
    assert not (tmp_path / "iter_0000005" / "extra").exists()


def test_leftovers_are_removed(tmp_path: Path, make: Make) -> None:
    make(1)
    make(2, name="iter_0000002.tmp")
    make(1, name="iter_0000001.removed.tmp")
    (tmp_path / f"{POINTER}.tmp").write_text("2")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["iter_0000001"]


@pytest.mark.parametrize(
    ("keep_last", "left"), [(1, [4, 9]), (2, [3, 4, 9]), (4, [1, 2, 3, 4, 9]), (8, [1, 2, 3, 4, 9])]
)
def test_keep_last(tmp_path: Path, make: Make, keep_last: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4, 9):
        make(step)
    remove_older(tmp_path, 4, Retention(keep_last))
    assert names(tmp_path) == [f"iter_{step:07d}" for step in left]
