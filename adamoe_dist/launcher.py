"""What the launcher said about this process. Imports no torch: commands ask before they load it."""

import os
import time
from dataclasses import dataclass

from adamoe_dist.errors import UserError

STARTED = time.monotonic()
"""When this process began, but for the start of Python itself."""

_HIGHEST_STEP = 0xFFFF0000
"""Slurm's numbers of steps that srun did not start (batch scripts, interactive shells) lie above, or are negative."""


@dataclass(frozen=True)
class Launch:
    """This process's place: from DeepSpeed's launcher, torchrun, Slurm's srun, or none (one process).

    ``node`` is the launcher's number of the machine: torchrun's GROUP_RANK (one agent a machine), DeepSpeed's
    CROSS_RANK or Slurm's SLURM_NODEID.
    """

    rank: int
    local_rank: int
    world_size: int
    node: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read RANK, LOCAL_RANK, WORLD_SIZE and the node, or else Slurm's; without a launcher this is the only process.

        A batch script, and the shell of salloc, have SLURM_PROCID and SLURM_NTASKS as a task of srun has them; a
        program started there is one process. Only srun's own steps have SLURM_STEP_NUM_TASKS and a SLURM_STEP_ID.
        """
        if "RANK" not in os.environ and _is_task_of_srun():
            return cls(
                rank=int(os.environ["SLURM_PROCID"]),
                local_rank=int(os.environ["SLURM_LOCALID"]),
                world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
                node=int(os.environ["SLURM_NODEID"]),
            )
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            node=int(os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or "0"),
        )

    def require_address(self) -> None:
        """Refuse several processes that were not told where to meet.

        Raises:
            UserError: naming the variable that is missing.
        """
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if self.world_size > 1 and missing:
            raise UserError(
                f"{' and '.join(missing)} not set for {self.world_size} processes; export the host of rank 0 and a "
                "free port of it, the same for every process, as launch/slurm.sbatch does"
            )


def _is_task_of_srun() -> bool:
    try:
        step, tasks = int(os.environ["SLURM_STEP_ID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    except (KeyError, ValueError):
        return False
    return 0 <= step < _HIGHEST_STEP and tasks > 1
