"""Assumptions as they are given: bounds, files, and refusals in one line."""

from pathlib import Path

import pytest

from adamoe_dist.errors import UserError
from adamoe_dist.planning import Assumptions, read_assumptions


def test_a_file_and_pairs(tmp_path: Path) -> None:
    file = tmp_path / "assumed.yaml"
    file.write_text("# measured\nmatmul_efficiency: 0.6\nlatency_us: 12\nhost_gb_s: 1e1\n")
    read = read_assumptions(Assumptions(), file, ["latency_us=7", "overlap=0"])
    assert (read.matmul_efficiency, read.latency_us, read.host_gb_s, read.overlap) == (0.6, 7.0, 10.0, 0.0)
    file.write_text("{matmul_efficiency: 0.3}")
    assert read_assumptions(Assumptions(), file, []).matmul_efficiency == 0.3


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        ("speed=3", "no such assumption"),
        ("latency_us", "name=value"),
        ("latency_us=-1", "at least 0"),
        ("latency_us=inf", "at least 0"),
        ("latency_us=nan", "a number"),
        ("latency_us=true", "a number"),
        ("matmul_efficiency=[", r"matmul_efficiency=\[: must be a number"),
        ("matmul_efficiency=0", "above 0 and at most 1"),
        ("matmul_efficiency=5", "above 0 and at most 1"),
        ("overlap=3", "at least 0 and at most 1"),
        ("memory_share=1.01", "above 0 and at most 1"),
        ("expert_imbalance=0.9", "at least 1"),
        ("host_gb_s=0", "above 0"),
    ],
)
def test_refused_pairs(pair: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as refusal:
        read_assumptions(Assumptions(), None, [pair])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["matmul_efficiency=0.6", "[1", "speed: 1", "latency_us: null", "overlap: {a: 1}"])
def test_a_refused_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "assumed.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"--assumptions {file}"):
        read_assumptions(Assumptions(), file, [])
    with pytest.raises(UserError, match="no such file"):
        read_assumptions(Assumptions(), tmp_path / "none", [])
