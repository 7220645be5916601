"""A plan as a configuration that can be trained and as a Slurm file that starts it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.errors import UserError
from adamoe_dist.planning.plan import Plan


def planned_config(plan: Plan) -> Config:
    """Return the configuration with everything that the plan decided said out loud."""
    parallel: Any = {"expert": plan.resolved.layout.expert}
    train: Any = {"micro_batch_size": plan.resolved.micro_batch_size}
    return dataclasses.replace(
        plan.config,
        parallel=dataclasses.replace(plan.config.parallel, **parallel),
        train=dataclasses.replace(plan.config.train, **train),
    )


def write_config(plan: Plan, path: Path, overwrite: bool) -> None:
    """Write a configuration for launch/pretrain.py.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    cluster = plan.cluster
    head = f"# Planned for {cluster.nodes} x {cluster.gpus_per_node} {cluster.device.name}.\n"
    _write(path, head + planned_config(plan).to_yaml(), "--write-config", overwrite)


def write_slurm(plan: Plan, config: Path, template: Path, path: Path, overwrite: bool) -> None:
    """Write a Slurm file after the project's own, with the plan's machines and its configuration.

    Args:
        plan: what it starts.
        config: the configuration's path, as the job will find it from the checkout.
        template: launch/slurm.sbatch.
        path: where to write.
        overwrite: replace a file that is there.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    cluster, text = plan.cluster, template.read_text(encoding="utf-8")
    devices = "" if cluster.device.is_cpu else rf"\g<1>{cluster.gpus_per_node}"
    for pattern, replacement in (
        (r"^(#SBATCH --nodes=)\d+$", rf"\g<1>{cluster.nodes}"),
        (r"^(#SBATCH --ntasks-per-node=)\d+$", rf"\g<1>{cluster.gpus_per_node}"),
        (r"^(#SBATCH --gpus-per-node=)\d+$", devices),
        (r"^(config=\$\{CONFIG:-)[^}]*\}$", rf"\g<1>{config}}}"),
    ):
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count == 1, f"{template} has {count} lines like {pattern}"
    _write(path, text, "--write-slurm", overwrite)


def _write(path: Path, text: str, option: str, overwrite: bool) -> None:
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{option} {path}: is there already; give another name or --overwrite") from None
    except OSError as problem:
        raise UserError(f"{option} {path}: cannot be written ({problem.strerror})") from None
