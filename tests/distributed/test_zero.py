"""ZeRO's stages: orders of passes, recomputed activations, an offloaded optimizer, fp16. One model in each."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.distributed.cases import Outcome, merged, train
from tests.distributed.harness import Ranks
from tests.distributed.marks import quick
from tests.distributed.matrix import apart, worst
from tests.distributed.zero_checks import (
    held_in_step,
    loss_scale_of_another_precision,
    overflow_in_fp16,
    passes,
    resume_in_fp16,
    save_in_fp16,
    staged,
    train_in_fp16,
    train_with_nodes_before_norms,
    weights_of_rank,
)

pytestmark = pytest.mark.distributed

COMMON = {
    "train": {"global_batch_size": 8, "micro_batch_size": 1, "gradient_clipping": 0.5},
    "optimizer": {"learning_rate": 1e-3},
}
RICH = merged(
    COMMON,
    {
        "model": {"tie_embeddings": True},
        "moe": {
            "shared_expert_hidden_size": 24,
            "null_types": {"identity": 2, "constant": 2},
            "router": {
                "balance": {"scope": "global_batch"},
                "capacity_factor": 1.5,
                "target_load": 1.4,
                "score_function": "sigmoid",
            },
        },
    },
)
"""Tied embeddings, a shared expert computed while rows travel, null types, capacity, a target load."""
SGD = {"optimizer": {"type": "sgd", "learning_rate": 1.0}, "train": {"gradient_clipping": 0.0}}

RanksOf = Callable[[int], Ranks]
_KNOWN: dict[str, Outcome] = {}


def known(ranks_of: RanksOf, world: int, changes: dict[str, Any], *arguments: Any) -> Outcome:
    """The outcome on rank 0; each run is made once."""
    key = repr((world, changes, arguments))
    if key not in _KNOWN:
        _KNOWN[key] = ranks_of(world).run(train, changes, *arguments)[0]
    return _KNOWN[key]


def assert_alike(outcome: Outcome, expected: Outcome, tolerance: float) -> None:
    gradients = {name: apart(outcome.gradients[name], g, g) for name, g in expected.gradients.items()}
    weights = {name: apart(outcome.weights[name], w, w) for name, w in expected.weights.items()}
    found = {
        "losses": worst(outcome.losses, expected.losses),
        "norms": worst(outcome.norms, expected.norms),
        "balance": worst(outcome.balance_losses, expected.balance_losses),
        "gradients": max(gradients.values()),
        "weights": max(weights.values()),
    }
    print(found)
    assert max(found.values()) <= tolerance, found
    for name, bias in expected.biases.items():
        torch.testing.assert_close(outcome.biases[name], bias, rtol=1e-5, atol=1e-7)


VARIANTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(("stage", "precision"), quick(VARIANTS, [(2, "fp32"), (3, "fp32")]))
def test_order_of_passes_does_not_matter(ranks_of, stage, precision):
    """A pipeline runs several backward passes with no forward pass between them.

    Through the engine's own backward only stage 3 then loses gradients where DeepSpeed is not told.
    """
    changes = merged(staged(SGD, stage), {"train": {"global_batch_size": 8, "micro_batch_size": 1}})
    ranks = ranks_of(2)
    norm, weights = ranks.run(passes, changes, precision, "FBFBFBFB", True)[0]
    for order in ("FFBBFFBB", "FFFFbbbb"):
        other_norm, other = ranks.run(passes, changes, precision, order, True)[0]
        assert other_norm == pytest.approx(norm, rel=1e-6)
        assert max(apart(other[name], weight, weight) for name, weight in weights.items()) < 1e-6
    lost_norm, _ = ranks.run(passes, changes, precision, "FFBBFFBB", False)[0]
    print(f"{norm=} {lost_norm=}")
    assert (abs(lost_norm / norm - 1) > 1e-3) == (stage == 3)


@pytest.mark.parametrize(
    ("recompute", "stage"),
    quick(
        [(recompute, stage) for recompute in ("selective", "full") for stage in range(4)],
        [("selective", 2), ("selective", 3), ("full", 1), ("full", 3)],
    ),
)
def test_recomputed_activations_change_nothing(ranks_of, stage, recompute):
    """Four micro-batches a rank. Counts, and with them the target load's biases, would double if made twice."""
    expected = known(ranks_of, 2, staged(RICH, stage), 2, 2)
    changes = merged(staged(RICH, stage), {"train": {"recompute": recompute}})
    outcome = ranks_of(2).run(train, changes, 2, 2)[0]
    assert outcome.biases
    if recompute == "selective":  # full recompute counts in the backward pass
        assert outcome.first_micro_batch == expected.first_micro_batch
    assert_alike(outcome, expected, 0.0)


def test_stage_3_differs_from_stage_1_by_the_order_of_one_sum(ranks_of):
    """DeepSpeed puts a node of its own before each module's inputs.

    A norm's input takes a gradient from the residual and two from within the norm: with the node those two are added
    first, without it the residual's comes first. With such a node in stage 1 all gradients are the same bits; without
    it they differ by 9e-6 of a gradient that is itself what large terms leave.
    """
    plain, stage_3 = known(ranks_of, 2, RICH, 2, 2), known(ranks_of, 2, staged(RICH, 3), 2, 2)
    same_order = ranks_of(2).run(train_with_nodes_before_norms, RICH, 1, 2)[0]
    for name, gradient in stage_3.gradients.items():
        assert torch.equal(gradient, same_order.gradients[name]), name
    assert_alike(stage_3, plain, 5e-5)


@pytest.mark.parametrize(("stage", "precision"), quick(VARIANTS, [(2, "fp32")]))
def test_many_small_buckets_train_alike(ranks_of, stage, precision):
    """The other tests' models fit in one bucket; here one is smaller than the largest weight, as a step's part is."""
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size"), 3000)
    sizes |= {"stage3_max_live_parameters": 6000, "stage3_max_reuse_distance": 3000}
    changes = merged(staged(COMMON, stage), {"zero": {"deepspeed": {"zero_optimization": sizes}}})
    outcome = ranks_of(4).run(train, changes, 3, 2, precision)[0]
    assert_alike(outcome, known(ranks_of, 4, staged(COMMON, stage), 3, 2, precision), 1e-6)


@pytest.mark.parametrize(("stage", "precision"), quick(VARIANTS[1:4] + VARIANTS[5:], [(2, "fp32"), (3, "fp32")]))
def test_offloaded_optimizer_trains_alike(ranks_of, stage, precision):
    expected = known(ranks_of, 4, staged(COMMON, stage), 3, 2, precision)
    offload = {"zero": {"offload_optimizer": True}, "optimizer": {"implementation": "torch"}}
    outcome = ranks_of(4).run(train, merged(staged(COMMON, stage), offload), 3, 2, precision)[0]
    assert_alike(outcome, expected, 1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("stage", quick([1, 2, 3], [2]))
def test_deepspeed_cpu_adam_trains_alike(ranks_of, stage):
    """One step from the same gradients: tests/parallel/test_optimizer.py derives the bound, here for both together.

    Further steps would amplify that: an element whose gradient is little more than rounding moves like any other.
    """
    from adamoe_dist.parallel import cpu_adam_problem

    problem = cpu_adam_problem()
    if problem:
        pytest.skip(problem)
    expected = known(ranks_of, 2, staged(COMMON, stage), 1, 2)
    offload = {"zero": {"offload_optimizer": True}, "optimizer": {"implementation": "deepspeed_cpu"}}
    outcome = ranks_of(2).run(train, merged(staged(COMMON, stage), offload), 1, 2)[0]
    assert outcome.losses == expected.losses
    assert outcome.norms == pytest.approx(expected.norms, rel=2.0**-23)  # stage 3: the last bit differs
    rate, rounding = COMMON["optimizer"]["learning_rate"], 2.0**-24
    for name, weight in expected.weights.items():
        assert torch.equal(outcome.gradients[name], expected.gradients[name]), name
        allowed = 2 * (rate * (12 * rounding + 5e-7) + 2 * rounding * weight.abs())
        assert bool(((outcome.weights[name] - weight).abs() <= allowed).all()), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_trains_near_fp32(ranks_of, stage):
    """On a CPU, with DeepSpeed's word that it cannot taken back: the arithmetic of loss scales is the same."""
    expected = known(ranks_of, 2, COMMON, 2, 2)
    outcome = ranks_of(2).run(train_in_fp16, staged(COMMON, stage), 2, 2)[0]
    print(outcome.norms, expected.norms)
    assert worst(outcome.losses, expected.losses) < 1e-3
    assert worst(outcome.norms, expected.norms) < 1e-2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflow_on_one_rank_skips_the_step_on_all(ranks_of, stage):
    changes = merged(staged({}, stage), {"train": {"global_batch_size": 4}})
    first, second = ranks_of(2).run(overflow_in_fp16, changes)
    assert first == second
    assert [skipped for skipped, *_ in first] == [False, True, False]
    assert [count for _, count, *_ in first] == [0, 1, 1]
    assert [change > 0 for *_, change in first] == [True, False, True]


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], [0, 2]))
def test_loss_scale_goes_on_from_a_checkpoint(ranks_of, tmp_path, stage):
    """Lowered and raised again at the same steps, with the same weights.

    DeepSpeed lowers the scale at the second overflow: one comes before the checkpoint and one after.
    """
    changes = merged(staged({}, stage), {"train": {"global_batch_size": 4}})
    expected, weights = ranks_of(2).run(save_in_fp16, changes, tmp_path)[0]
    found, again = ranks_of(2).run(resume_in_fp16, changes, tmp_path / "iter_0000002")[0]
    assert found == expected
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    scales = [state["cur_scale"] for state in expected]
    assert scales[0] == 2**15 and scales[-1] == 2**16 and expected[-1]["skipped_steps"] == 2


def test_no_other_precision_has_a_loss_scale(ranks_of):
    assert ranks_of(2).run(loss_scale_of_another_precision)[0] == (None, 1.0, 0)


LARGER = {
    "model": {"hidden_size": 256},
    "moe": {"expert_hidden_size": 256},
    "parallel": {"expert": 1},
    "train": {"global_batch_size": 4, "micro_batch_size": 1},
}
"""5.6 M weights, so that a bucket is a sixteenth of the model."""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Ranks]:
    """Two ranks in which nothing of other tests is alive."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(("stage", "precision"), quick(VARIANTS, [*VARIANTS[:4], (2, "bf16")]))
def test_each_stage_holds_the_shards_that_it_promises(fresh, stage, precision):
    """Live tensors on two ranks: stages 2 and 3 hold half of the gradients, stage 3 half of the weights.

    A bucket may come on top, and in stage 2 the one weight, here at most 8 experts' 256 x 512, that both ranks share.
    """
    width = 4 if precision == "fp32" else 2
    for elements, before, after in fresh.run(held_in_step, staged(LARGER, stage), precision):
        print(elements, before, after)
        gradients = 4 * elements / (1 if stage < 2 else 2)
        if (stage, precision) == (1, "bf16"):
            gradients += width * elements  # the last micro-batch's, which DeepSpeed leaves where they arrived
        allowed = 4 * elements / 16 + (4 * 8 * 256 * 512 if stage == 2 else 0)
        assert gradients <= before.gradients <= gradients + 1.1 * allowed
        weights = width * elements / (1 if stage < 3 else 2)
        for live in (before, after):
            assert weights <= live.weights <= 1.01 * weights
        masters = 0 if (stage, precision) == (0, "fp32") else 4
        state = (masters + 8) * elements / (1 if stage == 0 else 2)
        assert state <= after.optimizer <= 1.01 * state


@pytest.mark.parametrize("tied", quick([False, True], [True]))
def test_planned_weights_of_a_rank_are_those_that_are_built(ranks_of, tied):
    changes = {
        "model": {"num_layers": 4, "tie_embeddings": tied, "num_query_groups": 2},
        "moe": {"layer_frequency": 2, "shared_expert_hidden_size": 24, "null_types": {"identity": 2, "constant": 2}},
    }
    layouts = [{"tensor": 2, "pipeline": 2}, {"expert_tensor": 2, "expert": 2}, {"tensor": 2, "expert": 4}]
    for degrees in (*layouts, {"pipeline": 2, "context": 2, "expert": 2}):
        for built, planned in ranks_of(4).run(weights_of_rank, merged(changes, {"parallel": degrees})):
            assert built == planned, degrees
