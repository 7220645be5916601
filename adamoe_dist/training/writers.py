"""Where metrics go, on rank 0: JSON lines, and by tags to TensorBoard, CSV files and Weights & Biases."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adamoe_dist.config import Config
from adamoe_dist.files import RecordFile, replacing
from adamoe_dist.monitoring import CsvWriter, RoutingCounts, TensorBoardWriter, WandbWriter
from adamoe_dist.training.metrics import Record, RoutingRecord

logger = logging.getLogger(__name__)

TAGS = {
    "lm_loss": "loss/lm",
    "balance_loss": "loss/balance",
    "z_loss": "loss/z",
    "validation_loss": "loss/validation",
    "validation_bits_per_byte": "loss/validation_bits_per_byte",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "loss_scale": "optimizer/loss_scale",
    "skipped_steps": "optimizer/skipped_steps",
    "bad_steps": "health/bad_steps",
    "loss_spikes": "health/loss_spikes",
    "step_time_s": "speed/step_time_s",
    "tokens_per_second": "speed/tokens_per_second",
    "model_flops_per_second": "speed/model_tflops_per_second",
    "mfu": "speed/mfu",
    "memory_peak_gib": "speed/memory_peak_gib",
    "time_data_s": "time/data_s",
    "time_forward_s": "time/forward_s",
    "time_routing_s": "time/routing_s",
    "time_dispatch_s": "time/dispatch_s",
    "time_experts_s": "time/experts_s",
    "time_combine_s": "time/combine_s",
    "time_backward_s": "time/backward_s",
    "time_pipeline_s": "time/pipeline_s",
    "time_optimizer_s": "time/optimizer_s",
    "time_other_s": "time/other_s",
    "time_save_s": "time/save_s",
    "save_stall_s": "checkpoint/stall_s",
    "save_write_s": "checkpoint/write_s",
    "saves_failed": "checkpoint/failed",
    "true_experts_per_token": "routing/true_experts_per_token",
    "true_experts_per_token_min": "routing/true_experts_per_token_min",
    "true_experts_per_token_max": "routing/true_experts_per_token_max",
    "expert_max_over_mean": "routing/expert_max_over_mean",
    "null_share": "routing/null_share",
    "all_null_share": "routing/all_null_share",
    "score_entropy": "routing/score_entropy",
    "dropped_share": "routing/dropped_share",
    "expert_flops_saved": "routing/expert_flops_saved",
    "target_load_error": "routing/target_load_error",
    "dispatch_rows": "dispatch/rows",
    "dispatch_rows_same_rank": "dispatch/rows_same_rank",
    "dispatch_rows_same_node": "dispatch/rows_same_node",
    "dispatch_rows_other_node": "dispatch/rows_other_node",
    "dispatch_rows_undeduplicated": "dispatch/rows_undeduplicated",
    "dispatch_bytes": "dispatch/bytes",
    "dispatch_bytes_same_node": "dispatch/bytes_same_node",
    "dispatch_bytes_other_node": "dispatch/bytes_other_node",
}
"""The tag of each metric."""

LAYER_SCALARS = (
    "true_experts_per_token",
    "null_share",
    "all_null_share",
    "expert_max_over_mean",
    "expert_load_entropy",
    "score_entropy",
    "expert_bias_min",
    "expert_bias_max",
)
"""Fields of a layer's record that are scalars ``layers/NAME/NUMBER``, as its rows and bytes by distance are."""

SCALES = {"model_flops_per_second": 1e-12}
"""Factors of metrics whose tag has another unit."""


class JsonlWriter:
    """One JSON object a line, each written at once and whole; see :class:`~adamoe_dist.files.RecordFile`."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open ``path`` to add to.

        Lines of steps after ``first_step`` (of a run that stopped later) are dropped, and all where it is 0: such a run
        begins anew, with its first validation.
        """
        self._file = RecordFile(path, partial(_keep_lines, path, first_step))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record; numbers that are NaN or infinite, for which JSON has no words, become null."""
        plain = {name: None if _is_not_finite(value) else value for name, value in record.items()}
        self._file.add((json.dumps(plain, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _keep_lines(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    with replacing(path) as unfinished, path.open("rb") as old, unfinished.open("wb") as new:
        new.writelines(line.rstrip() + b"\n" for line in old if last_step and _step_of(line) <= last_step)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _step_of(line: bytes) -> float:
    """Return a line's step; a line cut off by a crash counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def scalars_of(record: Record, layers: Mapping[int, RoutingRecord]) -> dict[str, float]:
    """Return the scalars of a record and of each MoE layer, by tag; what there is no number for is left out."""
    scalars = {tag: record[name] * SCALES.get(name, 1) for name, tag in TAGS.items() if name in record}
    for number, layer in layers.items():
        values = {name: getattr(layer, name) for name in LAYER_SCALARS}
        values |= {f"rows_{distance}": rows for distance, rows in layer.rows.items()}
        values |= {f"bytes_{distance}": sent for distance, sent in layer.sent_bytes.items()}
        scalars |= {f"layers/{name}/{number:02d}": value for name, value in values.items() if value is not None}
    return scalars


def routing_counts(layers: Mapping[int, RoutingRecord]) -> RoutingCounts:
    """Return what pictures are drawn from."""
    records = layers.values()
    return RoutingCounts(
        list(layers),
        np.array([layer.tokens_by_load for layer in records]),
        np.array([layer.tokens_by_expert for layer in records]),
    )


def counts_record(step: int, counts: RoutingCounts) -> dict[str, Any]:
    """Return a line of ``routing.jsonl``: for each MoE layer the counts of :class:`RoutingCounts`."""
    return {
        "step": step,
        "layers": list(counts.layers),
        "tokens_by_true_experts": counts.tokens_by_load_LC.tolist(),
        "tokens_by_expert": counts.tokens_by_expert_LE.tolist(),
    }


class ScalarWriter(Protocol):
    """What every writer of tagged scalars can."""

    what: str
    """What it writes, in words."""

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add the scalars of a step."""

    def close(self) -> None:
        """End it."""


class Board:
    """The writers of tagged scalars that a run asks for, and of counts. Pictures and texts are TensorBoard's alone.

    The training needs none of them: one that cannot write is left out with a warning.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        """Open the writers of a run that goes on after ``first_step``.

        Raises:
            UserError: Weights & Biases refuses the run.
        """
        monitor, run_dir = config.monitor, config.run_dir
        self._tensorboard = TensorBoardWriter(run_dir / "tensorboard", first_step) if monitor.tensorboard else None
        self._writers: list[ScalarWriter] = [self._tensorboard] if self._tensorboard else []
        if monitor.csv:
            with _warned_of(CsvWriter.what):
                self._writers.append(CsvWriter(run_dir, first_step))
        if monitor.wandb.project is not None:
            with _warned_of(WandbWriter.what):
                self._writers.append(WandbWriter(config))
        if self._tensorboard:
            self._tensorboard.write_start(config)
        self._counts = JsonlWriter(run_dir / "routing.jsonl", first_step)
        self._image_interval = monitor.image_interval
        self._last_picture: int | None = None

    def write(self, record: Record, layers: Mapping[int, RoutingRecord], is_last: bool = False) -> None:
        """Add one record and that of each MoE layer; counts and pictures where they are due or none follow."""
        step, scalars = int(record["step"]), scalars_of(record, layers)
        working = []
        for writer in self._writers:
            with _warned_of(writer.what):
                writer.write_scalars(scalars, step)
                working.append(writer)
        self._writers = working
        if layers and (is_last or self._is_picture_due(step)):
            counts = routing_counts(layers)
            self._counts.write(counts_record(step, counts))
            if self._tensorboard and self._image_interval is not None:
                self._tensorboard.write_routing(counts, step)
            self._last_picture = step

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text."""
        if self._tensorboard:
            self._tensorboard.write_text(tag, text, step)

    def finish(self) -> None:
        """Say that the run is done."""
        if self._tensorboard:
            self._tensorboard.write_end()

    def close(self) -> None:
        """Close the writers."""
        self._counts.close()
        for writer in self._writers:
            with _warned_of(writer.what):
                writer.close()

    def _is_picture_due(self, step: int) -> bool:
        """Tell whether a multiple of the interval has passed since the last picture; the first is always due."""
        interval = self._image_interval
        if interval is None:
            return False
        return self._last_picture is None or step // interval > self._last_picture // interval


@contextlib.contextmanager
def _warned_of(what: str) -> Iterator[None]:
    """Turn an error of the system into a warning."""
    try:
        yield
    except OSError as problem:
        logger.warning("warning: %s: nothing more is written (%s); the training goes on", what, problem)
