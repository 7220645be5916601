"""The cost of measuring, at a tiny size."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.commands import benchmark

pytestmark = pytest.mark.end_to_end


def test_monitoring(tmp_path: Path) -> None:
    sizes = ["--hidden", "32", "--layers", "2", "--sequence", "16", "--samples", "4", "--pairs", "4"]
    done = benchmark("monitoring.py", *sizes, "--json", str(tmp_path / "m.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for part in ("| the clock |", "| a trace |", "| nobody |", "us a range"):
        assert part in done.stdout
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["rows"]["the clock"]["pairs"] == 4 and content["rows"]["a trace"]["pairs"] == 1
    # Data, the optimizer, and in each of two micro-batches both passes and eight ranges of each of two layers.
    assert content["count"]["ranges"] == 2 + 2 * (2 + 2 * 8)
    assert content["count"]["heard_us"] > content["count"]["unheard_us"] > 0
