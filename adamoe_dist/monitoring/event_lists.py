"""The same scalars by DeepSpeed's monitor writers: CSV files and Weights & Biases.

DeepSpeed's writers take lists of ``(tag, value, step)`` and write on rank 0 only; its communication must be open.
"""

import csv
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

from deepspeed.monitor.config import CSVConfig
from deepspeed.monitor.config import WandbConfig as DeepSpeedWandbConfig
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.wandb import WandbMonitor

from adamoe_dist.config import Config
from adamoe_dist.errors import UserError


class CsvWriter:
    """A file for each tag, ``csv/<tag with _ for />.csv``, with the columns ``step`` and the last part of the tag."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open ``run_dir/csv``; lines of steps after ``first_step`` are dropped, and all files where it is 0."""
        settings = CSVConfig(enabled=True, output_path=str(run_dir), job_name="csv")
        self._monitor = csvMonitor(settings)
        for path in sorted((run_dir / "csv").glob("*.csv")):
            if first_step and path.stat().st_size:
                _keep_steps(path, first_step)
                self._monitor.filenames.append(path.stem)  # it has its head already
            else:
                path.unlink()

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a line to the file of each tag."""
        self._monitor.write_events([(tag, value, step) for tag, value in values.items()])

    def close(self) -> None:
        """Do nothing: every line is on its own."""


class WandbWriter:
    """One run of a project on Weights & Biases, named like this one; a resumed run goes on in it."""

    def __init__(self, config: Config) -> None:
        """Start or continue the run; its own files are in the run directory."""
        settings = config.monitor.wandb
        for name, value in (("WANDB_NAME", config.run.name), ("WANDB_DIR", str(config.run_dir.absolute()))):
            os.environ.setdefault(name, value)
        remembered = config.run_dir / "wandb_run_id"
        if config.checkpoint.resume != "none" and remembered.exists():
            os.environ.setdefault("WANDB_RUN_ID", remembered.read_text(encoding="utf-8").strip())
            os.environ.setdefault("WANDB_RESUME", "allow")
        self._monitor = WandbMonitor(
            DeepSpeedWandbConfig(enabled=True, project=settings.project or "", group=settings.group, team=settings.team)
        )
        import wandb

        if wandb.run is not None:
            remembered.write_text(wandb.run.id + "\n", encoding="utf-8")

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the scalars of a step."""
        self._monitor.write_events([(tag, value, step) for tag, value in values.items()])

    def close(self) -> None:
        """End the run there."""
        import wandb

        wandb.finish()


def check_wandb(config: Config) -> None:
    """Refuse Weights & Biases where its package is missing.

    Raises:
        UserError: it is.
    """
    project = config.monitor.wandb.project
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"monitor.wandb.project={project} needs the package wandb, which is not installed; install it (pip install "
            "wandb) or set monitor.wandb.project=null"
        )


def _keep_steps(path: Path, last: int) -> None:
    """Drop the lines of later steps, and one that was cut off."""
    with path.open(newline="", encoding="utf-8") as file:
        head, *lines = csv.reader(file)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *(line for line in lines if len(line) == 2 and int(line[0]) <= last)])
