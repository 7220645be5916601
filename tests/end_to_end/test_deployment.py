"""Every command of docs/deployment.md: run here, or by test_readme.py, or marked in the text as not run."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from adamoe_dist.training.writers import TAGS
from tests.end_to_end.commands import covered, fragments_run
from tests.end_to_end.conftest import REPOSITORY, Finished, free_port, run_command
from tests.end_to_end.test_readme import COMMANDS as README
from tests.end_to_end.test_readme import SMALL, on_two_nodes, with_port

pytestmark = pytest.mark.end_to_end

DOCUMENT = (REPOSITORY / "docs" / "deployment.md").read_text()
MARK = "Not run here:"
MANIFEST = REPOSITORY / "launch" / "kubernetes.yaml"
TINY = [*SMALL, "train.global_batch_size=8", "train.micro_batch_size=4", "monitor.tensorboard=false"]


def blocks() -> list[tuple[list[str], bool]]:
    """The commands of each shell block, and whether the line of text directly above it says that they are not run."""
    found = []
    for match in re.finditer(r"```(\w*)\n(.*?)```", DOCUMENT, flags=re.S):
        assert match[1] == "bash", f"a block that is no shell block: {match[0]}"
        lines = [line.strip() for line in match[2].splitlines() if line.strip()]
        found.append((lines, DOCUMENT[: match.start()].rstrip().endswith(MARK)))
    return found


COMMANDS = [command for commands, is_marked in blocks() if not is_marked for command in commands]


def only(fragment: str) -> str:
    """The one command to be run that contains ``fragment``, or ends in it where a ``$`` follows."""
    (command,) = [command for command in COMMANDS if fragment in f"{command}$" and command not in README]
    return command


@pytest.fixture(scope="module")
def site(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's commands and configurations, with a small corpus in the quickstart's place."""
    root = tmp_path_factory.mktemp("site")
    for name in ("adamoe_dist", "launch", "tools", "configs"):
        (root / name).symlink_to(REPOSITORY / name)
    data = root / "data" / "quickstart"
    data.mkdir(parents=True)
    for path in workspace.glob("corpus_*"):
        shutil.copy(path, data)
    shutil.copytree(workspace / "tokenizer", data / "tokenizer")
    return root


def run(command: str, site: Path, *changes: str) -> Finished:
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = run_command(
        ["bash", "-c", " ".join([command, *(f"'{change}'" for change in changes)])], site, 300, environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_sizing_writes_what_a_dry_run_then_checks(site) -> None:
    done = run(only(covered("tools/plan.py --config configs/quickstart.yaml")), site)
    assert "bottleneck:" in done.stdout
    assert "--nodes=2" in (site / "job.sbatch").read_text() and "planned.yaml" in (site / "job.sbatch").read_text()
    assert "ranks: 16 = " in run(only(covered("planned.yaml --dry-run")), site).stdout


def test_starting_continuing_and_looking(site) -> None:
    """With ``checkpoint.resume=auto`` one process starts, and two ranks go on with its run."""
    changes = [*TINY, "schedule.total_steps=3"]
    done = run(only(covered("run.name=one checkpoint.resume=auto") + "$"), site, *changes)
    assert "step 2/2" in done.stdout
    command = with_port(only(covered("checkpoint.resume=auto parallel.expert=4")))
    command = command.replace("per-node 8", "per-node 2").replace("expert=4", "expert=2")
    done = run(command, site, *changes, "train.steps=3")
    assert "continuing from runs/one/checkpoints/iter_0000002 after step 2" in done.stdout and "step 3/3" in done.stdout
    assert "run directory: runs/one" in run(only(covered("tail -n 3 runs/one/log.txt")), site).stdout
    assert 0 < float(run(only(covered("heartbeat.json")), site).stdout) < 600


def manifest() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    return service, job


def test_manifest_is_an_indexed_job_whose_pods_find_each_other() -> None:
    service, job = manifest()
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(values["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(values["RANKS"])
    (command,) = container["args"]
    assert f"--master-addr {name}-0.{pod['subdomain']} " in command
    save_s = int(re.search(r"--shutdown-timeout (\d+)", command)[1])
    assert pod["terminationGracePeriodSeconds"] > save_s > 30
    assert job["spec"]["backoffLimit"] % job["spec"]["completions"] == 0, "each start that fails costs one a node"
    assert f"--selector job-name={name},batch.kubernetes.io/job-completion-index=0" in DOCUMENT
    assert job["spec"]["podFailurePolicy"] and pod["restartPolicy"] == "Never", "the first needs the second"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.distributed
def test_command_of_the_manifest_trains_on_two_pods(site, tmp_path) -> None:
    """As each pod has it: its own copy of the image, index and numbers from the environment, the Service's name for the
    address of pod 0, and a volume in common where alone the data is.
    """
    _, job = manifest()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-euc"]
    (command,) = container["args"]
    shared = tmp_path / "shared"
    shutil.copytree(site / "data", shared / "data")
    changes = {"adamoe-0.adamoe": "127.0.0.1", "29500": str(free_port())}
    for there, here in changes.items():
        assert there in command
        command = command.replace(there, here)
    command = f"cd {container['workingDir']}; {command}"
    with_keys = " ".join([command, *(change for change in TINY if change not in SMALL)])
    shells = []
    for pod in (0, 1):
        image = tmp_path / f"pod{pod}"
        image.mkdir()
        for name in ("launch", "configs"):
            shutil.copytree(REPOSITORY / name, image / name)
        in_pod = with_keys.replace("/workspace/adamoe_dist", str(image)).replace("/shared", str(shared))
        shells.append(f"export NODES=2 RANKS=1 JOB_COMPLETION_INDEX={pod}; {in_pod}")
    on_two_nodes(shells, site)
    assert (
        "places: 2 nodes (0, 1); ranks 0-1 share a layer's experts, across nodes"
        in (shared / "runs" / "cluster" / "log.txt").read_text()
    )


def test_tags_to_look_at_are_written() -> None:
    """Those of layers have a layer's number behind them."""
    rows = re.findall(r"^\| ((?:`\w+/\w+`(?:, )?)+) \|", DOCUMENT, flags=re.M)
    named = {tag for row in rows for tag in re.findall(r"`(\w+/\w+)`", row)}
    writer = (REPOSITORY / "adamoe_dist" / "training" / "writers.py").read_text()
    assert len(named) > 12
    for tag in named:
        of_layer = f"{tag}/" in writer or f'"{tag.removeprefix("layers/")}"' in writer
        assert tag in TAGS.values() or (tag.startswith("layers/") and of_layer), tag


def test_every_command_is_run_by_a_test_or_marked() -> None:
    """A command that is added to the document needs a test, or the mark above its block."""
    assert sum(is_marked for _, is_marked in blocks()) == 3 and len(COMMANDS) > 10
    fragments = fragments_run(Path(__file__).read_text())
    untested = [c for c in COMMANDS if c not in README and not any(fragment in c for fragment in fragments)]
    assert not untested
    in_text = re.findall(r"`((?:deepspeed|torchrun|python|srun) [^`\n]*\.py[^`]*)`", DOCUMENT.replace("```", ""))
    assert set(in_text) <= {*COMMANDS, *README}
    assert "not run here" in DOCUMENT.partition("##")[0]
