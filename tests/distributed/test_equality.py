"""Expert parallelism trains the model that one process trains, whatever the router does; the matrix has all layouts.

The same eight micro-batches make a step in each layout, so that each rank has two of them or more. All layouts start
from the same weights, see the same routing, and may differ by the order of fp32 sums only.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cases import Outcome, merged, train
from tests.distributed.harness import Ranks
from tests.distributed.marks import quick
from tests.distributed.matrix import apart, worst
from tests.distributed.zero_checks import staged

pytestmark = pytest.mark.distributed

CLIP = 0.5
COMMON = {
    "train": {"global_batch_size": 8, "micro_batch_size": 1, "gradient_clipping": CLIP},
    "optimizer": {"learning_rate": 1e-3},
}
STAGES = [0, 1, 2, 3]
FEW = 2


RanksOf = Callable[[int], Ranks]
_REFERENCES: dict[str, Outcome] = {}


def reference(ranks_of: RanksOf, changes: dict[str, Any], *arguments: Any, steps: int = FEW) -> Outcome:
    """One process, ZeRO-1; trained once for each configuration."""
    key = repr((changes, arguments, steps))
    if key not in _REFERENCES:
        _REFERENCES[key] = ranks_of(1).run(train, changes, steps, 1, *arguments)[0]
    return _REFERENCES[key]


def assert_ranks_agree(outcomes: list[Outcome]) -> None:
    """All ranks have the same whole weights; that replicas are equal each run has checked itself."""
    for outcome in outcomes[1:]:
        assert outcome.weights.keys() == outcomes[0].weights.keys()
        for name, weight in outcome.weights.items():
            assert torch.equal(weight, outcomes[0].weights[name]), name


def assert_same_training(outcomes: list[Outcome], single: Outcome) -> None:
    """Losses, norms and balance losses and the first step's gradients agree to 1e-5."""
    assert_ranks_agree(outcomes)
    for outcome in outcomes:
        losses = worst(outcome.losses, single.losses)
        norms = worst(outcome.norms, single.norms)
        balance = worst(outcome.balance_losses, single.balance_losses)
        gradients = {
            name: apart(outcome.gradients[name], gradient, gradient) for name, gradient in single.gradients.items()
        }
        print(f"{losses=:.1e} {norms=:.1e} {balance=:.1e} gradients={max(gradients.values()):.1e}")
        assert outcome.gradients.keys() == single.gradients.keys()
        assert losses < 1e-5 and norms < 1e-5 and balance < 1e-5
        assert max(gradients.values()) < 1e-5, max(gradients, key=gradients.__getitem__)


def test_the_clipped_first_sgd_step_is_the_captured_gradient(ranks_of):
    """Ties ZeRO's update to the gradient that the hooks saw: lr x gradient x clip / norm."""
    changes = merged(
        COMMON, {"optimizer": {"type": "sgd", "learning_rate": 1.0, "weight_decay": 0.0}, "zero": {"stage": 2}}
    )
    for outcome in ranks_of(4).run(train, changes, 1, 2):
        squares = sum(float(gradient.double().square().sum()) for gradient in outcome.gradients.values())
        assert outcome.norms[0] == pytest.approx(squares**0.5, rel=1e-5)
        for name, gradient in outcome.gradients.items():
            step = outcome.initial[name] - outcome.weights[name]
            wanted = gradient * CLIP / squares**0.5
            torch.testing.assert_close(
                step, wanted, rtol=1e-3, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(("world", "stage"), quick([(w, s) for w in (2, 4) for s in STAGES], [(4, 2), (4, 3)]))
@pytest.mark.parametrize("force", ["starve", "all_null"])
def test_experts_without_rows_do_not_disturb_training(ranks_of, world, stage, force):
    single = reference(ranks_of, COMMON, "fp32", force)
    outcomes = ranks_of(world).run(train, staged(COMMON, stage), FEW, 2, "fp32", force)
    for outcome in (single, outcomes[0]):
        for tokens_by_load, expert_counts in outcome.first_micro_batch:
            assert sum(tokens_by_load) == 32
            if force == "starve":
                assert expert_counts[0] == 0 and sum(expert_counts) > 0
            else:
                assert tokens_by_load[0] == 32 and sum(expert_counts) == 0
    for outcome in outcomes[1:]:
        assert all(sum(expert_counts) > 0 for _, expert_counts in outcome.first_micro_batch)
    assert_same_training(outcomes, single)


@pytest.mark.parametrize(
    "router",
    [{"normalize": "all_selected"}, {"normalize": "none"}, {"null_init": "shared"}, {"null_init": "copy"}],
    ids=lambda router: "-".join(router.values()),
)
def test_router_variants_train_alike_on_two_ranks(ranks_of, router):
    changes = merged(COMMON, {"moe": {"router": router}})
    assert_same_training(ranks_of(2).run(train, changes, FEW, 2), reference(ranks_of, changes))


def test_the_baseline_trains_alike_on_two_ranks(ranks_of):
    router = {"type": "topk", "balance": {"type": "switch"}}
    changes = merged(COMMON, {"moe": {"num_null_experts": 0, "top_k": 2, "router": router}})
    assert_same_training(ranks_of(2).run(train, changes, FEW, 2), reference(ranks_of, changes))


def test_rows_sent_one_by_one_train_alike(ranks_of):
    changes = merged(COMMON, {"moe": {"dispatcher": {"deduplicate": False}}})
    assert_same_training(ranks_of(2).run(train, changes, FEW, 2), reference(ranks_of, COMMON))
