"""What would train wrongly without a message, one remedy taken away at a time: each must show, or be refused.

docs/design.md lists what can fail silently and names the test of each.
"""

from typing import Any

import pytest

from tests.distributed.cases import Outcome, merged, train
from tests.distributed.harness import RanksOf
from tests.distributed.matrix import COMMON, LAYOUTS, SGD, apart
from tests.distributed.silent_failures import refused_without, train_without, unequal_without
from tests.distributed.zero_checks import staged

pytestmark = pytest.mark.distributed

ONE_STEP: dict[str, Any] = {
    "model": {"num_layers": 2, "init_std": 0.3},
    "train": {"global_batch_size": 4},
    "optimizer": {"weight_decay": 0.0},
}
"""One step of plain SGD shows every gradient; with weights as large as these a fourth of its norm is the experts'."""
SMALL = merged(merged(COMMON, SGD), ONE_STEP)
TIED = {"model": {"tie_embeddings": True}}
FIRST_LOSS_SCALE = 2.0**16
_SINGLES: dict[str, Outcome] = {}


def single_process(ranks_of: RanksOf, changes: dict[str, Any], precision: str) -> Outcome:
    """One process under ZeRO-1; fp16 is held against fp32."""
    precision = "fp32" if precision == "fp16" else precision
    key = repr((changes, precision))
    if key not in _SINGLES:
        _SINGLES[key] = ranks_of(1).run(train, staged(changes, 1), 1, 1, precision)[0]
    return _SINGLES[key]


def way_of(outcome: Outcome, single: Outcome, names: str = "") -> float:
    """How far weights are off, over the way that they went in the one step."""
    chosen = [name for name in single.weights if name.endswith(names)]
    ours, theirs, start = outcome.weights, single.weights, single.initial
    return max(apart(ours[name], theirs[name], theirs[name] - start[name]) for name in chosen)


def norm_of(outcome: Outcome, _: Outcome) -> float:
    """How far the norm is off that of the whole gradient."""
    squares = sum(float(gradient.double().square().sum()) for gradient in outcome.gradients.values())
    return abs(outcome.norms[0] / squares**0.5 - 1)


def null_rows_of(outcome: Outcome, single: Outcome) -> float:
    """Their whole gradient is the auxiliary losses'."""
    return way_of(outcome, single, "null_weight")


def scaled_null_rows_of(outcome: Outcome, single: Outcome) -> float:
    """The same of gradients that bear fp16's first loss scale."""
    names = [name for name in single.gradients if name.endswith("null_weight")]
    pairs = [(outcome.gradients[name] / FIRST_LOSS_SCALE, single.gradients[name]) for name in names]
    return max(apart(ours, theirs, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("remedy", "layout", "stage", "precision", "measure", "right", "wrong"),
    [
        ("fp32 sums", "DP2", 1, "bf16", way_of, 1e-5, 1e-2),
        ("fp32 on the way", "DP2", 1, "bf16", way_of, 1e-5, 1e-2),
        ("fp32 on the way", "DP2", 2, "bf16", way_of, 1e-5, 1e-2),
        ("sums over tensor ranks", "TP2", 1, "fp32", way_of, 1e-4, 0.1),
        ("tied embedding", "PP2", 1, "fp32", way_of, 1e-4, 0.1),
        ("expert-tensor ranks in the norm", "ETP2", 1, "bf16", norm_of, 1e-5, 5e-3),
        ("expert-tensor ranks in the norm", "ETP2", 3, "fp32", norm_of, 1e-5, 5e-3),
        ("auxiliary losses over micro-batches", "PP2", 1, "fp32", null_rows_of, 1e-4, 0.5),
        ("auxiliary losses times the loss scale", "EP2", 1, "fp16", scaled_null_rows_of, 0.2, 0.9),
    ],
)
def test_a_remedy_taken_away_shows(ranks_of, remedy, layout, stage, precision, measure, right, wrong):
    changes = merged(SMALL, TIED if remedy == "tied embedding" else {})
    single = single_process(ranks_of, changes, precision)
    world, degrees = LAYOUTS[layout]
    arguments = (staged(changes, stage), 1, degrees, precision)
    with_it = measure(ranks_of(world).run(train_without, None, *arguments)[0], single)
    without_it = measure(ranks_of(world).run(train_without, remedy, *arguments)[0], single)
    print(f"{with_it=:.1e} {without_it=:.1e}")
    assert with_it < right
    assert without_it > wrong


def test_clipping_is_off_where_it_is_not_said_to_be_on(ranks_of):
    """DeepSpeed's own default clips to a norm of 1."""
    strong = {"moe": {"router": {"balance": {"coefficient": 10.0}}}, "train": {"gradient_clipping": 0.0}}
    changes = staged(merged(SMALL, strong), 2)
    for remedy in (None, "clipping"):
        outcome = ranks_of(1).run(train_without, remedy, changes, 1, 1, "fp32")[0]
        assert outcome.norms[0] > 1.5
        name = next(name for name in outcome.weights if name.endswith("null_weight"))
        step = (outcome.initial[name] - outcome.weights[name]) / SGD["optimizer"]["learning_rate"]
        found = apart(step, outcome.gradients[name], outcome.gradients[name])
        assert found < 1e-4 if remedy is None else found > 0.1


def test_ranks_that_draw_other_weights_are_found_before_a_broadcast_hides_it(ranks_of):
    for found in ranks_of(2).run(unequal_without, "one draw for all ranks", SMALL):
        assert "rank 1 has other bits of" in found
    assert ranks_of(2).run(unequal_without, None, SMALL) == ["", ""]


@pytest.mark.parametrize(
    ("remedy", "changes", "message"),
    [
        ("context ranks among the data ranks", {"parallel": {"context": 2}}, "is reduced over ranks"),
        ("family of experts", {"parallel": {"expert": 2}, "zero": {"stage": 3}}, "is reduced over ranks"),
        ("mark of a weight to be summed", {"parallel": {"tensor": 2}}, "as neither cut over and summed over"),
        *[
            ("one order of registration", {"parallel": {"expert": 1}, "zero": {"stage": stage}}, "rank 1 gave its")
            for stage in (0, 1)
        ],
    ],
)
def test_wiring_without_a_remedy_is_refused(ranks_of, remedy, changes, message):
    for refusal in ranks_of(2).run(refused_without, remedy, changes):
        assert message in refusal
    if remedy != "one order of registration":
        assert ranks_of(2).run(refused_without, None, changes) == ["", ""]
