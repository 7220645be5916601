"""Readers that leave early."""

import subprocess
import sys

from adamoe_dist.errors import EXIT_BROKEN_PIPE


def test_a_reader_that_leaves_ends_a_tool_without_a_word() -> None:
    program = (
        "from adamoe_dist.console import run_tool, say\nrun_tool(lambda _: [say('line') for _ in range(10**5)] and 0)"
    )
    tool = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout is not None and tool.stderr is not None
    tool.stdout.read(2)
    tool.stdout.close()
    assert tool.stderr.read() == b"" and tool.wait() == EXIT_BROKEN_PIPE
