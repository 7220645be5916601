"""Two runs of one command compared, on whichever device the command finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import metrics_of, run_command

RICH = [
    "moe.shared_expert_hidden_size=32",
    "moe.null_types={identity: 2, constant: 2}",
    "moe.router.target_load=1.4",
    "moe.router.capacity_factor=1.5",
]
SHORT = ["train.steps=4", "schedule.total_steps=4", "monitor.log_interval=1", "train.validation_interval=4"]


def require_same_metrics(
    command: Callable[..., list[str]], workspace: Path, name: str, changes: list[str], **variables: str
) -> list[dict[str, Any]]:
    """Run ``command`` twice and return its metrics: equal to the last bit but for times and memory."""
    outcomes = []
    for number in (1, 2):
        run_dir = f"runs/{name}-{number}"
        options = ["--config", "small.yaml", f"run.dir={run_dir}", "run.deterministic=true", *SHORT, *changes]
        done = run_command(command(*options), workspace, environment=variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        outcomes.append(metrics_of(workspace / run_dir))
    first, second = outcomes
    assert len(first) == 5 and first == second
    return first
