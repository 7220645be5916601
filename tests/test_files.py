"""Files that stay whole where the disk is full."""

from pathlib import Path

import pytest

from adamoe_dist.files import RecordFile, replacing
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
