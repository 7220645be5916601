"""What ranks do with an imported checkpoint."""

from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import merged


def logits_in_layout(checkpoint: Path, changes: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits (B, S, V) of tokens (B, S) by a checkpoint's model, loaded into a layout as a run loads it.

    Every rank computes all of them; None: this one's stage is not the last.
    """
    from adamoe_dist import platform
    from adamoe_dist.checkpoint import load_weights, read_config
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, Schedule, TrainingEngine, destroy_groups, initialize_groups

    launch = Launch.from_environment()
    tree = merged(
        read_config(checkpoint),
        {
            "data": {"tokenizer": "unused", "train": [{"path": "unused"}]},
            "model": {"sequence_length": tokens.shape[1]},
            "moe": {"router": {"balance": {"coefficient": 0.0}}},
            "train": {"global_batch_size": tokens.shape[0], "micro_batch_size": 1, "precision": "fp32"},
        },
    )
    config = config_from_dict(merged(tree, changes))
    resolved = resolve(config, launch.world_size)
    try:
        initialize_groups(launch, resolved)
        platform.seed_everything(1, deterministic=False)
        assert config.model.vocab_size is not None
        model = build_model(config, resolved, config.model.vocab_size, torch.float32, cuda=False).model
        engine = TrainingEngine(model, config, resolved, torch.float32, config.moe.num_experts)
        load_weights(checkpoint, engine)
        schedule = Schedule(engine, model, torch.float32, torch.device("cpu"))
        scores = schedule._through_stages(model.logits, tokens, model.hidden_shape(*tokens.shape))
        engine.close()
        return None if scores is None else scores[:, :, : config.model.vocab_size]
    finally:
        destroy_groups()
