"""The files that a plan becomes."""

import os
import subprocess
from pathlib import Path

import pytest

from adamoe_dist.config import config_from_dict, load_config
from adamoe_dist.planning import (
    DEVICES,
    Assumptions,
    Cluster,
    Plan,
    config_text,
    make_plan,
    slurm_text,
)
from tests.distributed.cases import BASE

TEMPLATE = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
CLUSTER = Cluster(nodes=3, gpus_per_node=4, device=DEVICES["h100"])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(config_from_dict(BASE | {"train": {"global_batch_size": 24}}), CLUSTER, Assumptions(), 32000)


def test_written_files_plan_the_same(plan: Plan, tmp_path: Path) -> None:
    config, job = tmp_path / "planned.yaml", tmp_path / "job"
    config.write_text(config_text(plan))
    job.write_text(slurm_text(plan, config, TEMPLATE))
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
