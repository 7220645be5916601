"""A whole training on two nodes: two network namespaces, each of which reaches the other by one link only."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.network import ADDRESSES, DEVICE, TwoNodes
from tests.end_to_end.conftest import REPOSITORY, deepspeed, metrics_of, run_command
from tests.namespaces import needs_namespaces

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed, needs_namespaces]

SHORT = ["--config", "small.yaml", "train.steps=6", "monitor.log_interval=1", "train.validation_interval=3"]
BY_PLACE = {f"dispatch_{what}_{place}" for what in ("rows", "bytes") for place in ("same_node", "other_node")}


@contextlib.contextmanager
def two_nodes(workspace: Path, folder: Path, slots: int, *overrides: str) -> Iterator[tuple[TwoNodes, list]]:
    """Start the command on both nodes, as a person types it, in an environment with nothing that it does not need."""
    (folder / "hostfile").write_text(f"node0 slots={slots}\nnode1 slots={slots}\n")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": DEVICE,
        "OMP_NUM_THREADS": "1",
    }
    shell = "cd {} && deepspeed -H {}/hostfile --no_ssh --node_rank {} --master_addr {} {} {}"
    script = str(REPOSITORY / "launch" / "pretrain.py")
    with TwoNodes() as nodes, contextlib.ExitStack() as files:
        processes = []
        for node in (0, 1):
            command = shell.format(workspace, folder, node, ADDRESSES[0], script, " ".join([*SHORT, *overrides]))
            output = files.enter_context((folder / f"node{node}.log").open("w"))
            processes.append(nodes.start(node, ["bash", "-c", command], environment, output))
        yield nodes, processes


def logs(folder: Path) -> str:
    return "\n".join((folder / f"node{node}.log").read_text()[-3000:] for node in (0, 1))


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, whole."""
    reader = torch_checkpoint.FileSystemReader(run_dir / "checkpoints" / "iter_0000006")
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    torch_checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def test_two_nodes_train_as_one_does(workspace: Path, tmp_path: Path) -> None:
    """Expert-parallel ranks on both nodes, two a node."""
    done = run_command(deepspeed(4, *SHORT, f"run.dir={tmp_path}/one"), workspace)
    assert done.returncode == 0, done.stderr[-3000:]
    with two_nodes(workspace, tmp_path, 2, f"run.dir={tmp_path}/two") as (_, processes):
        for process in processes:
            assert process.wait(timeout=200) == 0, logs(tmp_path)
    assert "ranks: 4 = data 4" in (tmp_path / "node0.log").read_text()

    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [record["step"] for record in two] == list(range(7))
    for alone, apart in zip(one, two, strict=True):
        assert set(alone) == set(apart)
        for name in set(alone) - BY_PLACE:
            exact = name.startswith("dispatch_") or name in ("step", "tokens_seen")
            assert apart[name] == (alone[name] if exact else pytest.approx(alone[name], rel=1e-5)), name
    for alone, apart in zip(one[1:], two[1:], strict=True):
        for what in ("dispatch_rows", "dispatch_bytes"):
            near, far = f"{what}_same_node", f"{what}_other_node"
            assert apart[near] + apart[far] == apart[what] == alone[what]
            assert alone[far] == 0 < apart[far]
            assert apart[near] > 0

    expected, found = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert set(expected) == set(found) and len(expected) > 50
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-8), name


@pytest.mark.slow
def test_a_machine_that_vanishes(workspace: Path, tmp_path: Path) -> None:
    """No process ends and no connection is closed: the link goes dark. Both sides leave within a minute."""
    with two_nodes(workspace, tmp_path, 1, f"run.dir={tmp_path}/dark", "train.steps=100000") as (nodes, processes):
        deadline = time.monotonic() + 150
        while "\nstep 5/" not in (tmp_path / "node0.log").read_text():
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes), logs(tmp_path)
            time.sleep(0.1)
        subprocess.run(["ip", "-n", nodes.names[1], "link", "set", DEVICE, "down"], check=True, timeout=10)
        dark = time.monotonic()
        for process in processes:
            assert process.wait(timeout=max(1.0, 60 - (time.monotonic() - dark))) != 0
    for node, lost in ((0, 1), (1, 0)):
        (line,) = [
            line for line in (tmp_path / f"node{node}.log").read_text().splitlines() if line.startswith("error:")
        ]
        assert line.startswith(f"error: rank {lost} on ") and "does not answer" in line
