"""The same scalars by DeepSpeed's monitor writers: CSV files and Weights & Biases.

DeepSpeed's writers take lists of ``(tag, value, step)`` and write on rank 0 only; its communication must be open.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from deepspeed.monitor.config import CSVConfig
from deepspeed.monitor.config import WandbConfig as DeepSpeedWandbConfig
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.wandb import WandbMonitor

from adamoe_dist.config import Config
from adamoe_dist.errors import UserError
from adamoe_dist.files import replacing

_FORM = re.compile(r"step,[^,\r\n]+(\r?\n(\d+,[^,\r\n]*\r?\n)*(\d+(,[^,\r\n]*)?)?)?\Z")
"""A head and lines ``step,value``; the last line may be cut off."""


class CsvWriter:
    """A file for each tag, ``csv/<tag with _ for />.csv``, with the columns ``step`` and the last part of the tag."""

    what = "CSV files"

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open ``run_dir/csv``; lines of steps after ``first_step`` are dropped, and all files where it is 0.

        Files that no such writer has made are left alone.
        """
        settings = CSVConfig(enabled=True, output_path=str(run_dir), job_name="csv")
        self._monitor = csvMonitor(settings)
        for path in sorted((run_dir / "csv").glob("*.csv")):
            content = path.read_bytes().decode("utf-8", "replace")
            if content and not _FORM.match(content):
                continue
            if first_step and "\n" in content:
                _keep_steps(path, content, first_step)
                self._monitor.filenames.append(path.stem)  # it has its head already
            else:
                path.unlink()

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a line to the file of each tag.

        Raises:
            OSError: a file cannot be written.
        """
        self._monitor.write_events([(tag, value, step) for tag, value in values.items()])

    def close(self) -> None:
        """Do nothing: every line is on its own."""


class WandbWriter:
    """One run of a project on Weights & Biases, named like this one; a resumed run goes on in it."""

    what = "Weights & Biases"

    def __init__(self, config: Config) -> None:
        """Start or continue the run; its own files are in the run directory.

        Raises:
            UserError: Weights & Biases refuses it.
        """
        import wandb

        settings = config.monitor.wandb
        for name, value in (("WANDB_NAME", config.run.name), ("WANDB_DIR", str(config.run_dir.absolute()))):
            os.environ.setdefault(name, value)
        remembered = config.run_dir / "wandb_run_id"
        if config.checkpoint.resume != "none" and remembered.exists():
            os.environ.setdefault("WANDB_RUN_ID", remembered.read_text(encoding="utf-8").strip())
            os.environ.setdefault("WANDB_RESUME", "allow")
        try:
            self._monitor = WandbMonitor(
                DeepSpeedWandbConfig(
                    enabled=True, project=settings.project or "", group=settings.group, team=settings.team
                )
            )
        except wandb.Error as problem:
            raise UserError(
                f"monitor.wandb.project={settings.project}: Weights & Biases does not open the run ({problem}); log in "
                "(wandb login), set WANDB_MODE=offline, or set monitor.wandb.project=null"
            ) from problem
        if wandb.run is not None:
            remembered.write_text(wandb.run.id + "\n", encoding="utf-8")

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the scalars of a step.

        Raises:
            OSError: they cannot be written, here or there.
        """
        with _errors_of_system():
            self._monitor.write_events([(tag, value, step) for tag, value in values.items()])

    def close(self) -> None:
        """End the run there.

        Raises:
            OSError: what is left cannot be written, here or there.
        """
        import wandb

        with _errors_of_system():
            wandb.finish()


@contextlib.contextmanager
def _errors_of_system() -> Iterator[None]:
    """Give the errors of Weights & Biases the kind that a disk's have."""
    import wandb

    try:
        yield
    except wandb.Error as problem:
        raise OSError(str(problem)) from problem


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


def _keep_steps(path: Path, content: str, last: int) -> None:
    """Drop the lines of later steps, and one that was cut off."""
    head, *lines = (line for line in content.splitlines(keepends=True) if line.endswith("\n"))
    with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        file.writelines([head, *(line for line in lines if int(line.partition(",")[0]) <= last)])
