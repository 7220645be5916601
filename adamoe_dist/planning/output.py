"""A plan as a configuration that can be trained and as a Slurm file that starts it."""

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping
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


def check_outputs(paths: Mapping[str, Path], overwrite: bool) -> None:
    """Refuse files that :func:`write_outputs` could not write.

    Args:
        paths: what is to be written, by the option that named it.
        overwrite: replace files that are there.

    Raises:
        UserError: naming the option, the file and the way out.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        target = path.resolve()
        if target in seen:
            raise UserError(f"{option} {path}: is the file of {seen[target]}, too; give another name")
        seen[target] = option
        if target.is_dir():
            raise UserError(f"{option} {path}: is a directory; give the name of a file")
        if target.exists() and not target.is_file():
            raise UserError(f"{option} {path}: is no regular file; give another name")
        if target.exists() and not overwrite:
            raise UserError(f"{option} {path}: is there already; give another name or --overwrite")
        if not target.parent.is_dir():
            raise UserError(f"{option} {path}: there is no directory {target.parent}; make it or give another name")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise UserError(f"{option} {path}: nothing can be written to {target.parent}; give another name")


def write_outputs(texts: Mapping[Path, str]) -> None:
    """Write files whole or not at all: none takes its name before all are written.

    Raises:
        UserError: one cannot be written.
    """
    unfinished: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            target = path.resolve()
            unfinished[target] = target.with_name(f".{target.name}.{os.getpid()}.partial")
            unfinished[target].write_text(text, encoding="utf-8", errors="surrogateescape")
        for target, partial in unfinished.items():
            partial.replace(target)
    except OSError as problem:
        raise UserError(f"{problem.filename}: cannot be written ({problem.strerror}); give another name") from None
    finally:
        for partial in unfinished.values():
            partial.unlink(missing_ok=True)
