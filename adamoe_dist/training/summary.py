"""The last lines of a run."""

import logging
import shlex
import signal
from pathlib import Path

from adamoe_dist.training.callback import Callback
from adamoe_dist.training.loop import Trainer
from adamoe_dist.training.recorder import Recorder

logger = logging.getLogger(__name__)


class Summary(Callback):
    """Says at the end what training changed, what null experts saved, and where to look."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_finish(self, trainer: Trainer) -> None:
        """Log the summary."""
        for line in summary_lines(trainer, self._recorder):
            logger.info("%s", line)


def summary_lines(trainer: Trainer, recorder: Recorder) -> list[str]:
    """Return the summary, one fact a line."""
    before, after, record = recorder.first_validation, recorder.last_validation, recorder.last_record
    lines = []
    if after and after is before:
        lines.append(f"validation loss: {after.loss:.4f} before training (nats a token), not measured since")
    elif after and before:
        lines.append(f"validation loss: {before.loss:.4f} before, {after.loss:.4f} after (nats a token)")
        lines.append(f"bits per byte: {before.bits_per_byte:.4f} before, {after.bits_per_byte:.4f} after")
    elif after:
        lines.append(f"validation loss: {after.loss:.4f} nats a token, {after.bits_per_byte:.4f} bits a byte")
    if after:
        lines.append(f"unigram entropy of the validation text: {after.unigram_entropy:.4f} nats a token")
    if record:
        moe = trainer.config.moe
        lines.append(
            f"load: {record['true_experts_per_token']:.3f} true experts a token of top_k={moe.top_k} "
            f"(null share {record['null_share']:.1%}, tokens with null experts only {record['all_null_share']:.1%}); "
            f"{record['expert_flops_saved']:.1%} of the expert FLOPs of top-{trainer.config.reference_top_k} saved"
        )
        lines.append(
            f"rows sent to other ranks in the last step: {record['dispatch_rows']}, un-deduplicated "
            f"{record['dispatch_rows_undeduplicated']}"
        )
    if trainer.seconds["save_write"]:
        lines.append(
            f"saves since the last record: training stood still for {trainer.seconds['save_stall']:.1f} s, "
            f"writing took {trainer.seconds['save_write']:.1f} s"
        )
    if trainer.stop_signal is not None:
        cause = "checkpoint.time_limit_minutes" if trainer.stop_signal == signal.SIGALRM else trainer.stop_signal.name
        lines.append(f"stopped by {cause} after step {trainer.step}; checkpoint.resume=auto goes on")
    lines.append(f"run directory: {trainer.config.run_dir}")
    if trainer.config.monitor.tensorboard:
        shown = shlex.quote(str(_with_other_runs(trainer.config.run_dir)))
        lines.append(f"look at it with: python -m tensorboard.main --logdir {shown}")
    return lines


def _with_other_runs(run_dir: Path) -> Path:
    """Return the parent where there are other runs beside this one, or else its own directory."""
    others = (path.parent for path in run_dir.parent.glob("*/tensorboard"))
    return run_dir.parent if any(other != run_dir for other in others) else run_dir
