"""The first page of TensorBoard: four questions, and the charts that answer each.

A chart names its tags by regular expressions that must match a tag from its beginning; each ends with ``$``, because
TensorBoard does not ask for a match to the end. No chart has a line for each layer, which of several runs would be
dozens of lines in a few colours: they are on the page *Scalars*. Charts that may stay empty are the last of their
question.
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
        "model TFLOP/s": ("speed/model_tflops_per_second",),
        "peak memory, GiB": ("speed/memory_peak_gib",),
        "rows of a step, by distance": ("dispatch/rows_(same_rank|same_node|other_node)",),
        "bytes of a step, by distance": ("dispatch/bytes_(same_node|other_node)",),
        "model FLOPs utilization, where the peak is known": ("speed/mfu",),
    },
    "Is it balanced?": {
        "true experts a token: all layers, least and most of a layer": ("routing/true_experts_per_token(_min|_max)?",),
        "busiest expert over the mean, in the most uneven layer": ("routing/expert_max_over_mean",),
        "null share of the slots": ("routing/null_share",),
        "tokens with null experts only": ("routing/all_null_share",),
        "entropy of the router's scores, nats": ("routing/score_entropy",),
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
