"""Where a conversion writes: refused before a byte is written, and nothing of the user's or of another run removed."""

import os
import resource
import threading
from pathlib import Path

import pytest

from adamoe_dist.checkpoint import verify_files
from adamoe_dist.convert import import_model, plan_import
from adamoe_dist.convert.outputs import MARKER, check_output, new_directory
from adamoe_dist.errors import UserError
from tests.convert import models


@pytest.fixture
def source(tmp_path: Path) -> Path:
    models.save(tmp_path / "hf", "mixtral")
    return tmp_path / "hf"


def write(target: Path, content: str = "new") -> None:
    with new_directory(target, 0) as directory:
        (directory / "file").write_text(content)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_output_in_use_and_no_room(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write(taken)
    assert names(taken) == ["note"]
    with pytest.raises(UserError, match=r"GB are to be written and the disk of .* has"):
        check_output(tmp_path / "new" / "deep", 10**17)
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    plan = plan_import(source)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match="nothing is left of it"):
            import_model(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["hf"]


def test_what_a_killed_run_left_is_removed(source: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "out.tmp" / "iter_0000000.tmp"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "out.tmp" / MARKER).touch()
    verify_files(import_model(plan_import(source), tmp_path / "out"))
    assert names(tmp_path) == ["hf", "out"] and MARKER not in names(tmp_path / "out")


def test_a_directory_of_the_users_with_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "note").write_text("mine")
    for check in (lambda target: check_output(target, 0), write):
        with pytest.raises(UserError, match=r"--to: .*out\.tmp is there.*no leftover.*move it away"):
            check(tmp_path / "out")
    assert (tmp_path / "out.tmp" / "note").read_text() == "mine" and names(tmp_path) == ["out.tmp"]


def test_two_runs_with_one_target_do_not_touch_each_others_files(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", 0) as directory:
        (directory / "file").write_text("first")
        for check in (lambda target: check_output(target, 0), write):
            with pytest.raises(UserError, match=r"another run is writing .*out\.tmp"):
                check(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "first" and names(tmp_path) == ["out"]


def test_of_many_runs_at_once_one_writes(tmp_path: Path) -> None:
    """Over what a killed run has left, so that they also meet where it is removed."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / MARKER).touch()
    done, refused = [], []
    start = threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        try:
            write(tmp_path / "out", str(number))
            done.append(str(number))
        except UserError as problem:
            refused.append(str(problem))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and len(refused) == 7, refused
    assert (tmp_path / "out" / "file").read_text() == done[0] and names(tmp_path) == ["out"]


def test_a_link_means_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "disk" / "inner").mkdir(parents=True)
    (tmp_path / "empty").symlink_to(tmp_path / "disk" / "inner")
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "new")
    for link in ("empty", "dangling"):
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink() and names(tmp_path / link) == ["file"]
    assert names(tmp_path / "disk") == ["inner", "new"]


def test_a_mount_point_is_refused_and_the_disk_above_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
        with pytest.raises(UserError, match=r"--to .*volume is a mount point.*give a new directory in it"):
            check_output(tmp_path / "volume", 0)
        check_output(tmp_path / "volume" / "inner", 0)
    with pytest.raises(UserError, match=rf"the disk of {tmp_path} has"):
        check_output(tmp_path / "volume", 10**17)


@pytest.mark.parametrize("length", [252, 256])
def test_a_name_that_is_too_long_even_while_it_is_written(tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError, match=r"--to .* cannot be made \(File name too long\)"):
        check_output(tmp_path / ("n" * length), 0)
    assert not names(tmp_path)


def test_a_name_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--to .*file/out cannot be made \(Not a directory\)"):
        check_output(tmp_path / "file" / "out", 0)
