"""Files that stay whole where the disk is full, and places that are checked beforehand."""

import os
from pathlib import Path

import pytest

from adamoe_dist.errors import UserError
from adamoe_dist.files import RecordFile, check_output_files, replacing, write_files
from tests.disk import small_files


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError), small_files(4), replacing(path) as unfinished:
        unfinished.write_text("longer than that")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "old")]
    with replacing(path) as unfinished:
        unfinished.write_text("new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "new")]


def test_files_appear_all_at_once_or_stay_as_they_were(tmp_path: Path) -> None:
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "link"
    write_files([("--a", first, b"old"), ("--b", second, b"old")])
    link.symlink_to(second)
    with small_files(4), pytest.raises(UserError, match=r"--c \S+third cannot be written \(File too large\); choose"):
        write_files([("--a", first, b"new"), ("--b", link, b"new"), ("--c", tmp_path / "third", b"longer")])
    assert first.read_bytes() == second.read_bytes() == b"old" and sorted(tmp_path.iterdir()) == [first, link, second]
    write_files([("--a", first, b"new"), ("--b", link, b"new")])
    assert first.read_bytes() == second.read_bytes() == b"new" and link.is_symlink()


def test_what_is_no_ordinary_file_is_not_replaced() -> None:
    check_output_files([("--output", Path("/dev/null"))], overwrite=False)
    write_files([("--output", Path("/dev/null"), b"text")])
    assert not Path("/dev/null").is_file()


def test_places_are_checked_beforehand(tmp_path: Path) -> None:
    there, free = tmp_path / "there", tmp_path / "free"
    there.write_text("as it was")
    (tmp_path / "folder").mkdir()
    for path, overwrite, why in (
        (there, False, "exists already; choose another name or add --overwrite"),
        (tmp_path / "folder", True, "is a directory; name a file in it"),
        (tmp_path / "none" / "file", True, "its directory does not exist; make it first"),
        (there / "file", True, "its directory does not exist"),
        (tmp_path / "folder" / ".." / "free", True, f"is --a {free} as well; choose another place"),
        (tmp_path / "folder" / ".." / "text", True, f"is --text {tmp_path / 'text'} as well"),
    ):
        with pytest.raises(UserError) as refusal:
            check_output_files([("--a", free), ("--b", path)], overwrite, [("--text", tmp_path / "text")])
        assert str(refusal.value).startswith(f"--b {path}") and why in str(refusal.value)
    check_output_files([("--a", free), ("--b", there)])
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written"):
            check_output_files([("--a", free)])
    assert there.read_text() == "as it was" and not free.exists()


def test_records_are_whole_and_what_a_full_disk_refuses_is_said_once(tmp_path: Path, caplog) -> None:
    path = tmp_path / "deep" / "records"
    records = RecordFile(path, lambda: None, head=b"head;")
    with small_files(14):
        records.add(b"first;")
        records.add(b"second;")
        assert path.read_bytes() == b"head;first;", "not the half of it"
        records.add(b"third;")
        assert len(caplog.messages) == 1 and "records is not written (File too large)" in caplog.messages[0]
    records.add(b"fourth;")
    records.close()
    assert path.read_bytes() == b"head;first;fourth;"
    assert caplog.messages[1:] == [f"{path} is written again"]
    RecordFile(path, lambda: None, head=b"head;").close()
    assert path.read_bytes() == b"head;first;fourth;"


def test_a_file_that_could_not_be_opened_is_tried_again(tmp_path: Path, caplog) -> None:
    calls = []

    def prepare() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")

    records = RecordFile(tmp_path / "records", prepare)
    records.add(b"lost")
    records.add(b"kept")
    records.add(b", and more")
    assert (tmp_path / "records").read_bytes() == b"kept, and more" and len(calls) == 3
    assert len(caplog.messages) == 2
