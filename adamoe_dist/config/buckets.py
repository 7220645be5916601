"""How much of a model DeepSpeed has in flight at once: the sizes of its buffers, from the size of the model."""

_PARTS = 16
_SMALLEST, _LARGEST = 2**18, 2**26


def bucket_sizes(elements: int) -> dict[str, int]:
    """Return DeepSpeed's sizes, all in elements, for a rank that trains so many.

    DeepSpeed's defaults of 5e8 to 1e9 are for models of billions: its reduction buffer is allocated in full whatever
    the model's size, and until a bucket is full all gradients stay whole, all gathered weights too. A sixteenth of the
    model at a time keeps that small beside the state. At least 1 MiB of fp32 is sent, at most 256 MiB.

    Args:
        elements: of the weights that are trained on this rank, before ZeRO shards them.
    """
    bucket = min(max(elements // _PARTS, _SMALLEST), _LARGEST)
    return {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": 2 * bucket,
        "stage3_max_reuse_distance": bucket,
        "sub_group_size": bucket,
    }
