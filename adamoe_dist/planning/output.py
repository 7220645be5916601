"""A plan as a configuration that can be trained and as a Slurm file that starts it."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from adamoe_dist.config import Config
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


def config_text(plan: Plan) -> str:
    """Return a configuration for launch/pretrain.py, as YAML."""
    cluster = plan.cluster
    head = f"# Planned for {cluster.nodes} x {cluster.gpus_per_node} {cluster.device.name}.\n"
    return head + planned_config(plan).to_yaml()


def slurm_text(plan: Plan, config: Path, template: Path) -> str:
    """Return a Slurm file after the project's own, with the plan's machines and its configuration.

    Args:
        plan: what it starts.
        config: the configuration, which all nodes find at this path made absolute.
        template: launch/slurm.sbatch.
    """
    cluster, text = plan.cluster, template.read_text(encoding="utf-8")
    quoted = shlex.quote(str(config.absolute()))  # quotes count in bash's ${NAME:-word}, where it is not quoted itself
    for pattern, value in (
        (r"^(#SBATCH --nodes=)\d+$", str(cluster.nodes)),
        (r"^(#SBATCH --ntasks-per-node=)\d+$", str(cluster.gpus_per_node)),
        (r"^(#SBATCH --gpus-per-node=)\d+$", "" if cluster.device.is_cpu else str(cluster.gpus_per_node)),
        (r"^(config=\$\{CONFIG:-)[^}]*\}$", quoted + "}"),
    ):
        lines = re.findall(pattern, text, flags=re.MULTILINE)
        assert len(lines) == 1, f"{template} has {len(lines)} lines like {pattern}"
        line = lines[0] + value if value else ""
        text = re.sub(pattern, lambda _, line=line: line, text, flags=re.MULTILINE)  # type: ignore[misc]
    return text
