"""What is shown of each layer's routing, against a count token by token of what the routers of all ranks were given."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.cases import BASE, VOCAB, batch_of, merged, tokens_of
from tests.distributed.marks import quick
from tests.distributed.matrix import COMMON, LAYOUTS

pytestmark = pytest.mark.distributed

CHANGES = merged(COMMON, {"train": {"micro_batch_size": 2}, "moe": {"dense_layers": [1]}})
BATCH, LENGTH = COMMON["train"]["global_batch_size"], COMMON["model"]["sequence_length"]
TRUE = COMMON["moe"]["num_experts"]
CELLS = quick(["DP2", "TP2 EP2", "CP2", "PP2", "TP2 x PP2", "PP2 x EP2"], ["TP2 EP2", "CP2", "PP2"])


def run_step(changes: dict[str, Any], degrees: dict[str, int], padded: bool) -> tuple[Any, dict[int, list[Any]]]:
    """One step's forward and backward passes; the records of all layers, and what this rank's routers saw."""
    from adamoe_dist import platform
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import (
        Launch,
        Schedule,
        TrainingEngine,
        data_parallel_rank,
        destroy_groups,
        initialize_groups,
    )
    from adamoe_dist.routing import read_vector
    from adamoe_dist.training.metrics import layer_vectors, routing_record

    launch = Launch.from_environment()
    config = config_from_dict(merged(merged(BASE, changes), {"parallel": degrees}))
    resolved = resolve(config, launch.world_size)
    initialize_groups(launch, resolved)
    try:
        platform.seed_everything(config.run.seed, deterministic=False)
        model = build_model(config, resolved, VOCAB, torch.float32, cuda=False).model
        engine = TrainingEngine(model, config, resolved, torch.float32, config.moe.num_experts)
        seen: dict[int, list[Any]] = {}
        for layer in model.moe_layers:
            layer.counters.reset()
            watch(layer.router, seen.setdefault(layer.layer_number - 1, []))
        batch = tokens_of(0, config.train.global_batch_size, config.model.sequence_length)
        micro = batch.split(resolved.micro_batch_size)[data_parallel_rank() :: resolved.layout.data]
        Schedule(engine, model, torch.float32, torch.device("cpu")).run([batch_of(part, padded) for part in micro])
        trainer: Any = SimpleNamespace(
            model=model,
            device=torch.device("cpu"),
            num_moe_layers=len(config.moe_layers),
            first_moe_layer=config.moe_layers.index(model.moe_layers[0].layer_number - 1),
        )
        vectors = layer_vectors(trainer)
        records = {
            number: routing_record(*read_vector(vector, config.moe.num_experts), config.moe.top_k)
            for number, vector in zip(config.moe_layers, vectors, strict=True)
        }
        engine.close()
        return records, seen
    finally:
        destroy_groups()


def watch(router: Any, seen: list[Any]) -> None:
    """Keep the scores, the padding and the choice of every pass through a router."""
    original = router.routing

    def routing(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        probs_TE, map_TE = original(logits, padding_mask)
        mask = None if padding_mask is None else padding_mask.reshape(-1).tolist()
        seen.append((logits.detach().reshape(-1, logits.shape[-1]).tolist(), mask, map_TE.tolist()))
        return probs_TE, map_TE

    router.routing = routing


def slowly(passes: list[Any], top_k: int) -> dict[str, Any]:
    """The same numbers, token by token."""
    by_load, by_expert, entropies = [0] * (top_k + 1), [0] * TRUE, []
    for logits, mask, chosen in passes:
        for place, (scores, row) in enumerate(zip(logits, chosen, strict=True)):
            if mask is not None and mask[place]:
                assert not any(row)
                continue
            weights = [math.exp(score - max(scores)) for score in scores]
            parts = [weight / math.fsum(weights) for weight in weights]
            entropies.append(-math.fsum(part * math.log(part) for part in parts))
            by_load[sum(row)] += 1
            for expert, is_chosen in enumerate(row):
                by_expert[expert] += is_chosen
    tokens, slots = len(entropies), sum(by_expert)
    shares = [count / slots for count in by_expert if count]
    return {
        "tokens_by_load": tuple(by_load),
        "tokens_by_expert": tuple(by_expert),
        "true_experts_per_token": slots / tokens,
        "null_share": 1 - slots / (tokens * top_k),
        "all_null_share": by_load[0] / tokens,
        "expert_max_over_mean": max(by_expert) / (slots / len(by_expert)),
        "expert_load_entropy": -math.fsum(share * math.log(share) for share in shares),
        "score_entropy": math.fsum(entropies) / tokens,
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", CELLS)
def test_records_are_those_of_every_token_once(ranks_of, layout, padded):
    world, degrees = LAYOUTS[layout]
    results = ranks_of(world).run(run_step, CHANGES, degrees, padded)
    ((single, _),) = ranks_of(1).run(run_step, CHANGES, {"expert": 1}, padded)
    records = results[0][0]
    assert list(records) == list(single) == [0, 2, 3], "the layers' numbers in the model"
    assert all(other == records for other, _ in results), "every rank knows them"
    for number, record in records.items():
        wanted = slowly([one for _, seen in results for one in seen.get(number, [])], COMMON["moe"]["top_k"])
        assert (sum(wanted["tokens_by_load"]) < BATCH * LENGTH) == padded
        for name, value in wanted.items():
            assert getattr(record, name) == pytest.approx(value, rel=1e-5), (number, name)
            assert getattr(record, name) == pytest.approx(getattr(single[number], name), rel=1e-5), (number, name)


def test_the_baseline_is_shown_alike(ranks_of):
    changes = merged(
        CHANGES, {"moe": {"num_null_experts": 0, "top_k": 2, "router": {"type": "topk", "balance": {"type": "switch"}}}}
    )
    results = ranks_of(2).run(run_step, changes, {"expert": 2}, False)
    for number, record in results[0][0].items():
        wanted = slowly([one for _, seen in results for one in seen[number]], 2)
        for name, value in wanted.items():
            assert getattr(record, name) == pytest.approx(value, rel=1e-5), (number, name)
