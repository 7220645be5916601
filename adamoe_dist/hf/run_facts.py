"""What lies around a checkpoint and says something of its model: what its run recorded, and the sizes of its data."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamoe_dist.config import Config, load_config
from adamoe_dist.data import read_info
from adamoe_dist.errors import UserError

RUN_CONFIG, METRICS, ROUTING, ENVIRONMENT = "config.yaml", "metrics.jsonl", "routing.jsonl", "environment.json"


@dataclass(frozen=True)
class Measured:
    """What a run recorded last, up to a checkpoint's step.

    Attributes:
        record: the last line of metrics.jsonl; empty: there is none.
        validation: the last one with a validation loss; empty: there is none.
        routing: the last line of routing.jsonl, counts of each MoE layer; empty: there is none.
        environment: versions and the like, of the run's last start; empty: they are not known.
    """

    record: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)


def run_of(checkpoint: Path, config: Config) -> Path | None:
    """Return the directory of the run that made a checkpoint; None where it does not lie among a run's own.

    A copy with another number of null experts may lie in a run's directory without being of that run: it is one of its
    checkpoints where it lies in ``checkpoints`` and the run's configuration is of the same model.

    Args:
        checkpoint: the checkpoint directory.
        config: of the checkpoint.
    """
    from adamoe_dist.checkpoint import SUBDIRECTORY
    from adamoe_dist.convert import meaning

    root = checkpoint.absolute().parent
    if root.name != SUBDIRECTORY or not (root.parent / RUN_CONFIG).is_file():
        return None
    try:
        of_run = load_config(str(root.parent / RUN_CONFIG), [])
    except UserError:
        return None
    return root.parent if meaning(of_run) == meaning(config) else None


def read_measured(run: Path | None, step: int) -> Measured:
    """Return what a run directory recorded up to ``step``; nothing where it has no files, or there is no run."""
    if run is None:
        return Measured()
    records, counts = _lines(run / METRICS, step), _lines(run / ROUTING, step)
    trained = [record for record in records if "lm_loss" in record]
    validated = [record for record in records if "validation_loss" in record]
    return Measured(
        trained[-1] if trained else {},
        validated[-1] if validated else {},
        counts[-1] if counts else {},
        _environment(run / ENVIRONMENT),
    )


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the records of a file up to ``step``; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for record in map(_parsed, lines) if record is not None and record["step"] <= step]


def _environment(path: Path) -> dict[str, Any]:
    return (_parsed(path.read_text(encoding="utf-8", errors="replace")) or {}) if path.is_file() else {}


def _parsed(line: str) -> dict[str, Any] | None:
    """Return the object of a line; None for one that a killed run or a full disk left unfinished."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def data_sizes(state: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return documents and tokens of a checkpoint's prepared training sets, by their fingerprints.

    Args:
        state: of the checkpoint. A set that is not there any more, or is another now, is left out.
    """
    sizes = {}
    for part in state.get("data", {}).get("datasets", []):
        try:
            info = read_info(part["prefix"])
        except UserError:
            continue
        if info.fingerprint == part["fingerprint"]:
            sizes[part["fingerprint"]] = (info.documents, info.tokens)
    return sizes
