"""Files that appear whole, places that are checked beforehand, and readers that leave early."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamoe_dist.console import check_output_file, write_whole
from adamoe_dist.errors import EXIT_BROKEN_PIPE, UserError


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "report.json", tmp_path / "link.json"
    write_whole("--output", file, "old")
    link.symlink_to(file)
    write_whole("--output", link, "new")
    assert file.read_text() == "new" and link.is_symlink()

    def full(self: Path, text: str, **_: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"--output .*report.json cannot be written \(No space left"):
        write_whole("--output", file, "newer")
    assert file.read_text() == "new" and sorted(tmp_path.iterdir()) == [link, file]


def test_what_is_no_ordinary_file_is_not_replaced() -> None:
    check_output_file("--output", "/dev/null")
    write_whole("--output", "/dev/null", "text")
    assert not Path("/dev/null").is_file()


def test_places_are_checked_beforehand(tmp_path: Path) -> None:
    check_output_file("--output", tmp_path / "new.json")
    with pytest.raises(UserError, match="is a directory"):
        check_output_file("--output", tmp_path)
    with pytest.raises(UserError, match="its directory does not exist"):
        check_output_file("--output", tmp_path / "no" / "where.json")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written"):
            check_output_file("--output", tmp_path / "new.json")


def test_a_reader_that_leaves_ends_a_tool_without_a_word() -> None:
    program = (
        "from adamoe_dist.console import run_tool, say\nrun_tool(lambda _: [say('line') for _ in range(10**5)] and 0)"
    )
    tool = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout is not None and tool.stderr is not None
    tool.stdout.read(2)
    tool.stdout.close()
    assert tool.stderr.read() == b"" and tool.wait() == EXIT_BROKEN_PIPE
