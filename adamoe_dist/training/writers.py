"""Where metrics go: ``metrics.jsonl`` and TensorBoard. Both belong to rank 0."""

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from adamoe_dist.training.metrics import LayerRecord, Record

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
    "null_share": "routing/null_share",
    "all_null_share": "routing/all_null_share",
    "dropped_share": "routing/dropped_share",
    "expert_flops_saved": "routing/expert_flops_saved",
    "target_load_error": "routing/target_load_error",
    "dispatch_rows": "dispatch/rows",
    "dispatch_rows_same_rank": "dispatch/rows_same_rank",
    "dispatch_rows_same_node": "dispatch/rows_same_node",
    "dispatch_rows_other_node": "dispatch/rows_other_node",
    "dispatch_rows_undeduplicated": "dispatch/rows_undeduplicated",
    "dispatch_bytes": "dispatch/bytes",
}

SCALES = {"model_flops_per_second": 1e-12}
"""Factors of metrics whose tag has another unit."""


class JsonlWriter:
    """One JSON object a line, flushed."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open ``path`` to add to.

        Lines of steps after ``first_step`` (of a run that stopped later) are dropped, and all where it is 0: such a run
        begins anew, with its first validation.
        """
        kept = []
        if path.exists() and first_step:
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= first_step]
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._file.flush()

    def write(self, record: Record) -> None:
        """Add one record; numbers that are NaN or infinite, for which JSON has no words, become null."""
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _step_of(line: str) -> float:
    """Return a line's step; a line cut off by a crash counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


class TensorBoardWriter:
    """The same metrics as TensorBoard scalars, grouped, and the routing of each MoE layer."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Open ``directory``; events after ``first_step`` are hidden."""
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)

    def write(self, record: Record, layers: list[LayerRecord]) -> None:
        """Add one record and that of each MoE layer."""
        step = int(record["step"])
        for name, tag in TAGS.items():
            if name in record:
                self._writer.add_scalar(tag, record[name] * SCALES.get(name, 1), step)
        for number, layer in enumerate(layers):
            self._writer.add_scalar(f"layers/true_experts_per_token/{number:02d}", layer.true_experts_per_token, step)
            self._writer.add_scalar(f"layers/null_share/{number:02d}", layer.null_share, step)
            self._writer.add_scalar(f"layers/all_null_share/{number:02d}", layer.all_null_share, step)
            self._writer.add_scalar(f"layers/expert_max_over_mean/{number:02d}", layer.expert_load_max_over_mean, step)
            if layer.expert_bias_min is not None and layer.expert_bias_max is not None:
                self._writer.add_scalar(f"layers/expert_bias_min/{number:02d}", layer.expert_bias_min, step)
                self._writer.add_scalar(f"layers/expert_bias_max/{number:02d}", layer.expert_bias_max, step)
        self._writer.flush()

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Add a text."""
        self._writer.add_text(tag, f"```\n{text}\n```", step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        self._writer.close()
