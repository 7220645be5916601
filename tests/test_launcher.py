"""Where a process learns its place from."""

import pytest

from adamoe_dist.errors import UserError
from adamoe_dist.launcher import Launch

BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
TASK = {
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "CROSS_RANK"):
            monkeypatch.delenv(name)

    def set_to(variables: dict[str, str]) -> Launch:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return Launch.from_environment()

    return set_to


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch(0, 0, 1, 0)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "GROUP_RANK": "2"}, Launch(5, 1, 8, 2)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "CROSS_RANK": "3"}, Launch(5, 1, 8, 3)),
        (TASK, Launch(3, 1, 4, 1)),
        ({**TASK, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Launch(1, 1, 2, 0)),  # torchrun in a task of srun
        (BATCH_SCRIPT, Launch(0, 0, 1, 0)),
        ({**BATCH_SCRIPT, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"}, Launch(0, 0, 1, 0)),  # salloc
        ({**BATCH_SCRIPT, "SLURM_STEP_ID": "-5", "SLURM_STEP_NUM_TASKS": "4"}, Launch(0, 0, 1, 0)),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch(0, 0, 1, 0)),  # srun -n 1 --pty bash
    ],
)
def test_place_in_each_launchers_words(environment, variables: dict[str, str], expected: Launch) -> None:
    assert environment(variables) == expected


def test_several_processes_need_a_place_to_meet(environment, monkeypatch) -> None:
    launch = environment(TASK)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT not set for 4 processes"):
        launch.require_address()
    monkeypatch.setenv("MASTER_ADDR", "node0")
    with pytest.raises(UserError, match=r"^MASTER_PORT not set"):
        launch.require_address()
    monkeypatch.setenv("MASTER_PORT", "29500")
    launch.require_address()
    Launch(0, 0, 1).require_address()
