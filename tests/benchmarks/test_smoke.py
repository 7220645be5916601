"""Every benchmark runs at tiny sizes, prints its table and writes numbers that add up."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.commands import REPOSITORY, benchmark, environment

pytestmark = pytest.mark.end_to_end
PROGRAMS = sorted(p.name for p in (REPOSITORY / "benchmarks").glob("*.py") if "run_tool(main)" in p.read_text())
only_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path is for machines without CUDA")


def numbers(path: Path) -> Any:
    content = json.loads(path.read_text())
    assert content["command"] and "torch" in content["machine"] and content["options"]
    return content


def printed(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "megatron-core" in done.stdout
    assert "| --- |" in done.stdout
    for part in expected:
        assert part in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name: str) -> None:
    done = benchmark(name, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and ("--json" in done.stdout or name == "gpu.py")


@pytest.mark.distributed
def test_dispatch(tmp_path: Path) -> None:
    sizes = ["--tokens", "96", "--hidden", "32", "--expert-hidden", "16", "--pairs", "1", "--experts", "8", "64"]
    done = benchmark("dispatch.py", *sizes, "--json", str(tmp_path / "a.json"), ranks=2)
    printed(done, "torchrun --nproc-per-node 2 benchmarks/dispatch.py", "n=8", "n=64", "m=64 k=8")
    rows = {(row["num_experts"], row["variant"]): row for row in numbers(tmp_path / "a.json")["rows"]}
    for (n, variant), row in rows.items():
        copies = variant.startswith("Megatron") or "a row a pair" in variant
        assert row["rows"] > row["floor"] if copies else row["rows"] == row["floor"], (n, variant)
        assert row["bytes"] >= row["rows"] * 32 * 4
    for n in (8, 64):
        megatron, ours = rows[n, "Megatron top-2"], rows[n, "m=0 k=2"]
        assert megatron["load"] == ours["load"] == 2 and megatron["floor"] == ours["floor"]
        pairs, rows_of_ranks = rows[n, f"m={n} k=3, a row a pair"], rows[n, f"m={n} k=3"]
        assert pairs["load"] == rows_of_ranks["load"] and pairs["floor"] == rows_of_ranks["floor"]


def test_records(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--experts", "4", "--top-k", "2", "--tokens", "64", "--repeats", "2"]
    printed(benchmark("records.py", *sizes, "--json", str(tmp_path / "a.json")), "2 layers, n = 4", "CSV")
    times = numbers(tmp_path / "a.json")["seconds"]
    assert len(times) == 5 and all(len(values) == 2 and min(values) > 0 for values in times.values())


def test_null_share(tmp_path: Path) -> None:
    sizes = ["--tokens", "320", "--hidden", "32", "--expert-hidden", "16", "--sequence", "32", "--pairs", "1"]
    more = ["--shares", "0", "0.5", "0.9", "--model-top-k", "2", "--json", str(tmp_path / "a.json")]
    printed(benchmark("null_share.py", *sizes, *more), "null share", "marin", "23-31 %")
    content = numbers(tmp_path / "a.json")
    assert [point["load"] for point in content["layer"]] == pytest.approx([8, 4, 0.8], abs=1e-12)
    peaks = [point["peak_bytes"] for point in content["layer"]]
    assert peaks[0] > peaks[1] > peaks[2] > 0
    assert content["model"][0]["tenth_to_nine_tenths"]["pairs"] == 1


def test_null_share_refuses_a_share_that_is_not_exact() -> None:
    done = benchmark("null_share.py", "--tokens", "128", "--top-k", "1", "--shares", "0.3")
    assert done.returncode == 2 and "no exact share 0.3" in done.stderr


def test_routing(tmp_path: Path) -> None:
    sizes = ["--tokens", "64", "--hidden", "32", "--expert-hidden", "16", "--experts", "16", "--repeats", "2"]
    done = benchmark("routing.py", *sizes, "--json", str(tmp_path / "a.json"))
    printed(done, "Megatron top-2", "Megatron top-8", "m=16 k=8", "operators")
    for group in numbers(tmp_path / "a.json")["groups"]:
        for row in group:
            assert row["times"].keys() >= {"scores", "selection", "planning", "layer_backward"}
            assert all(value > 0 for value in row["times"].values())
            assert row["profile"]["operators"] <= row["profile"]["all_operators"]


@only_cpu
def test_gpu_program_on_a_cpu(tmp_path: Path) -> None:
    done = benchmark("gpu.py", str(tmp_path), "--device", "cpu", "--tiny")
    printed(done, "against float64", "Megatron top-2, SequentialMLP", "peak MiB")
    content = numbers(tmp_path / "gpu.json")
    assert {check["dtype"] for check in content["checks"]} == {"float32", "bfloat16"}
    assert all(check["error"] <= check["tolerance"] for check in content["checks"])
    loads = [layer["load"] for layer in content["layers"]]
    assert loads[0] == 2 and loads == sorted(loads, reverse=True)


@only_cpu
def test_gpu_program_stops_where_the_layer_is_wrong(tmp_path: Path) -> None:
    """A kernel that is off by one part in a hundred is found, and nothing is timed."""
    (tmp_path / "wrong.py").write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r})\n"
        "import common\n"
        "from adamoe_dist.experts import GroupedExperts\n"
        "right = GroupedExperts.forward\n"
        "def wrong(*arguments, **keywords):\n"
        "    output, bias = right(*arguments, **keywords)\n"
        "    return output * 1.01, bias\n"
        "GroupedExperts.forward = wrong\n"
        f"runpy.run_path({str(REPOSITORY / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')\n"
    )
    done = benchmark(str(tmp_path / "wrong.py"), str(tmp_path / "out"), "--device", "cpu", "--tiny")
    assert done.returncode == 1 and "nothing was timed" in done.stderr
    assert numbers(tmp_path / "out" / "gpu.json")["layers"] == []


@only_cpu
def test_gpu_command_says_what_is_missing(tmp_path: Path) -> None:
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=os.sep)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "finds no CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_memory(tmp_path: Path) -> None:
    sizes = ["--hidden", "32", "--layers", "1", "--length", "32", "--ranks", "1", "--precisions", "fp32"]
    printed(benchmark("memory.py", *sizes, "--json", str(tmp_path / "m.json")), "offloaded", "selective")
    rows = numbers(tmp_path / "m.json")["rows"]
    assert [row["case"]["stage"] for row in rows] == [0, 1, 2, 3, 2, 1, 1, 1]
    assert all(
        row[name] > 0 for row in rows for name in ("weights", "optimizer", "peak_passes", "peak_step", "planned")
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_convert(tmp_path: Path) -> None:
    sizes = ["--gigabytes", "0.01", "--hidden", "64", "--directory", str(tmp_path), "--json", str(tmp_path / "c.json")]
    printed(benchmark("convert.py", *sizes), "| import |", "the export has the files that were imported, to the byte")
    content = numbers(tmp_path / "c.json")
    assert content["same"]
    parts = content["parts"]
    assert parts["import"]["written"] > 2 * content["made"]["bytes"] and parts["export"]["ours"]["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json"]


def test_checkpoint(tmp_path: Path) -> None:
    sizes = ["--hidden", "64", "--layers", "1", "--pairs", "1", "--directory", str(tmp_path)]
    printed(benchmark("checkpoint.py", *sizes, "--json", str(tmp_path / "c.json")), "plain save", "stall in background")
    times = numbers(tmp_path / "c.json")["times"]
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in times["seconds"].values())
    assert 12 * times["parameters"] < times["bytes"] < 12.1 * times["parameters"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json"]
