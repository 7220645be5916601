"""The files that a plan becomes: what is in them, and that they appear whole or not at all."""

import os
import subprocess
from pathlib import Path

import pytest

from adamoe_dist.config import config_from_dict, load_config
from adamoe_dist.errors import UserError
from adamoe_dist.planning import (
    DEVICES,
    Assumptions,
    Cluster,
    Plan,
    check_outputs,
    config_text,
    make_plan,
    slurm_text,
    write_outputs,
)
from tests.distributed.cases import BASE

TEMPLATE = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
CLUSTER = Cluster(nodes=3, gpus_per_node=4, device=DEVICES["h100"])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(config_from_dict(BASE | {"train": {"global_batch_size": 24}}), CLUSTER, Assumptions(), 32000)


def test_written_files_plan_the_same(plan: Plan, tmp_path: Path) -> None:
    config, job = tmp_path / "planned.yaml", tmp_path / "job"
    job.write_text("an older one")
    write_outputs({config: config_text(plan), job: slurm_text(plan, config, TEMPLATE)})
    again = make_plan(load_config(config), CLUSTER, Assumptions(), 32000)
    assert again.time == plan.time and again.memory == plan.memory
    changed = set(job.read_text().splitlines()) - set(TEMPLATE.read_text().splitlines())
    assert changed == {
        "#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4",
        f"config=${{CONFIG:-{config}}}",
    }  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [job, config]


@pytest.mark.parametrize("name", [r"a\1b.yaml", "a b}$(touch x).yaml", "a'b\".yaml", "`touch x`.yaml", "plain.yaml"])
def test_bash_reads_the_configuration_s_path_as_it_is(plan: Plan, tmp_path: Path, name: str, monkeypatch) -> None:
    """From another directory than the one that it was written in."""
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in slurm_text(plan, Path(name), TEMPLATE).splitlines() if line.startswith("config=")]
    script = f'set -euo pipefail\n{line}\nprintf %s "$config"'
    environment = {name: value for name, value in os.environ.items() if name != "CONFIG"}
    (tmp_path / "elsewhere").mkdir()
    for given, expected in (({}, str(tmp_path / name)), ({"CONFIG": "other file.yaml"}, "other file.yaml")):
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env=environment | given, cwd=tmp_path / "elsewhere"
        )
        assert (done.stdout, done.stderr) == (expected, "")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    there, free = tmp_path / "there", tmp_path / "free"
    there.write_text("as it was")
    (tmp_path / "folder").mkdir()
    for path, overwrite, why in (
        (there, False, "there already"),
        (tmp_path / "folder", True, "is a directory"),
        (tmp_path / "none" / "file", True, "no directory"),
        (there / "file", True, "no directory"),
        (Path("/dev/null"), True, "no regular file"),
        (tmp_path / "folder" / ".." / "free", True, "--write-config"),
    ):
        with pytest.raises(UserError, match=why) as refusal:
            check_outputs({"--write-config": free, "--write-slurm": path}, overwrite)
        assert str(refusal.value).startswith(f"--write-slurm {path}: ")
    check_outputs({"--write-config": free, "--write-slurm": there}, True)
    assert there.read_text() == "as it was" and not free.exists()


def test_nothing_is_half_written(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("as it was")
    with pytest.raises(UserError, match="cannot be written"):
        write_outputs({there: "new", tmp_path / "none" / "file": "new"})
    assert there.read_text() == "as it was" and list(tmp_path.iterdir()) == [there]
