"""The first page of TensorBoard: four questions, and the charts that answer each.

A chart names its tags by regular expressions that must match a tag from its beginning; each ends with ``$``, because
TensorBoard does not ask for a match to the end.
"""

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars

Charts = dict[str, tuple[str, ...]]

QUESTIONS: dict[str, Charts] = {
    "Is it learning?": {
        "loss, nats a token": ("loss/lm", "loss/validation"),
        "validation, bits a byte": ("loss/validation_bits_per_byte",),
        "gradient norm before clipping": ("optimizer/grad_norm",),
        "learning rate": ("optimizer/learning_rate",),
        "bad steps, loss spikes, skipped steps so far": ("health/.*", "optimizer/skipped_steps"),
    },
    "Is it fast?": {
        "tokens a second": ("speed/tokens_per_second",),
        "seconds a step": ("speed/step_time_s",),
        "seconds a step, by phase": ("time/(data|forward|backward|pipeline|optimizer|other|save)_s",),
        "seconds of the forward pass in MoE layers": ("time/(routing|dispatch|experts|combine)_s",),
        "model FLOPs utilization": ("speed/mfu",),
        "model TFLOP/s": ("speed/model_tflops_per_second",),
        "peak memory, GiB": ("speed/memory_peak_gib",),
        "rows of a step, by distance": ("dispatch/rows_(same_rank|same_node|other_node)",),
        "bytes of a step, by distance": ("dispatch/bytes_(same_node|other_node)",),
    },
    "Is it balanced?": {
        "true experts a token": ("routing/true_experts_per_token",),
        "true experts a token, by layer": ("layers/true_experts_per_token/.*",),
        "null share of the slots, by layer": ("layers/null_share/.*",),
        "tokens with null experts only, by layer": ("layers/all_null_share/.*",),
        "busiest expert over the mean, by layer": ("layers/expert_max_over_mean/.*",),
        "entropy of the expert load, nats, by layer": ("layers/expert_load_entropy/.*",),
        "entropy of the router's scores, nats, by layer": ("layers/score_entropy/.*",),
        "balance loss and z-loss": ("loss/balance", "loss/z"),
        "distance from the target load; dropped pairs": ("routing/target_load_error", "routing/dropped_share"),
    },
    "Is it saving?": {
        "part of the expert FLOPs saved": ("routing/expert_flops_saved",),
        "rows sent, and without de-duplication": ("dispatch/rows", "dispatch/rows_undeduplicated"),
        "bytes sent": ("dispatch/bytes",),
        "checkpoints: seconds of stall and of writing": ("checkpoint/(stall|write)_s",),
        "checkpoints: saves failed so far": ("checkpoint/failed",),
    },
}
"""Work and communication that null experts and de-duplication save, and checkpoints, stand under the last one."""


def layout() -> Summary:
    """Return the page as TensorBoard's plugin ``custom_scalars`` reads it."""
    return custom_scalars(
        {
            question: {title: ("Multiline", [f"{tag}$" for tag in tags]) for title, tags in charts.items()}
            for question, charts in QUESTIONS.items()
        }
    )
