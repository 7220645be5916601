"""No operation of a training step is one that torch refuses on CUDA where bits must not vary.

Without CUDA the operations that a step calls can still be listed, forward and backward, and held against torch's own
list (`torch.use_deterministic_algorithms`). What CUDA calls instead of a CPU kernel (attention) is not seen here.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.cases import BASE, VOCAB, merged, tokens_of

pytestmark = pytest.mark.distributed

REFUSED = (
    "avg_pool",
    "adaptive_",
    "fractional_max_pool",
    "max_unpool",
    "upsample_",
    "reflection_pad",
    "nll_loss",
    "ctc_loss",
    "put.",
    "put_.",
    "histc",
    "kthvalue",
    "median.dim",
    "grid_sampler",
    "scatter_reduce",
)
"""Beginnings of names after ``aten.``; further, ``bincount`` with weights and ``cumsum`` of what is not an integer."""

BASELINE = {
    "moe": {
        "num_null_experts": 0,
        "top_k": 2,
        "router": {"type": "topk", "balance": {"type": "switch"}},
    }
}
VARIANTS: dict[str, dict[str, Any]] = {
    "null experts with output": {
        "moe": {
            "shared_expert_hidden_size": 24,
            "null_types": {"identity": 2, "constant": 2},
            "router": {"target_load": 1.4, "capacity_factor": 1.5, "balance": {"scope": "global_batch"}},
        }
    },
    "row a pair, sigmoid": {"moe": {"dispatcher": {"deduplicate": False}, "router": {"score_function": "sigmoid"}}},
    "all-gather, residual": {"moe": {"dispatcher": {"type": "allgather"}, "router": {"gating_residual": True}}},
    "padded": {"moe": {"dispatcher": {"pad_to_capacity": True}, "router": {"capacity_factor": 1.5}}},
    "baseline": BASELINE,
    "tensor-parallel": {"parallel": {"tensor": 2}, "model": {"tie_embeddings": True}},
}


class Operations(TorchDispatchMode):
    """Lists what is called: names, those that would be refused apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.refused: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        self.seen.add(name)
        weighted = name.startswith("bincount") and (len(arguments) > 1 and arguments[1] is not None)
        summed = name.startswith(("cumsum", "cumprod")) and arguments[0].dtype.is_floating_point
        if name.startswith(REFUSED) or weighted or summed or (keywords or {}).get("weights") is not None:
            self.refused.add(name)
        return function(*arguments, **(keywords or {}))


def operations_of(changes: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Of two micro-batches and the step after them: all operations, and those that torch would refuse."""
    from adamoe_dist import platform
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups

    launch = Launch.from_environment()
    common = {"run": {"deterministic": True}, "moe": {"experts": {"kernel": "sequential"}}}
    config = config_from_dict(merged(merged(BASE, common), changes))
    resolved = resolve(config, launch.world_size)
    platform.fix_order_of_sums()
    initialize_groups(launch, resolved)
    try:
        platform.seed_everything(1, deterministic=True)
        model = build_model(config, resolved, VOCAB, torch.float32, cuda=False).model
        engine = TrainingEngine(model, config, resolved, torch.float32, config.moe.num_experts)
        operations = Operations()
        with operations:
            engine.start_step(2)
            for index in range(2):
                engine.backward(engine(tokens_of(index, 2, 32)).mean())
            engine.step()
        engine.close()
        return operations.seen, operations.refused
    finally:
        platform.seed_everything(1, deterministic=False)
        destroy_groups()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_calls_nothing_that_has_no_fixed_order(ranks_of, variant):
    for seen, refused in ranks_of(2).run(operations_of, VARIANTS[variant]):
        assert {"mm.default", "topk.default"} <= seen
        assert any("backward" in name for name in seen), "the backward pass is not seen"
        assert not any(name.startswith("embedding_dense_backward") for name in seen)
        assert not refused


def test_what_would_be_refused_is_found():
    with Operations() as operations:
        torch.ones(3).cumsum(0)
        torch.bincount(torch.ones(2, dtype=torch.int64), torch.ones(2))
        torch.histc(torch.ones(2))
        torch.ones(3, dtype=torch.int64).cumsum(0)
        torch.nn.functional.nll_loss(torch.ones(2, 2), torch.ones(2, dtype=torch.int64))
    assert {name.partition(".")[0] for name in operations.refused} == {
        "cumsum",
        "bincount",
        "histc",
        "nll_loss_forward",
    }
