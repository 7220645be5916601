"""A run that goes on in another layout is the unbroken run of the old one; no sample is repeated or skipped.

Every source is trained under the selection bias of a target load, which has to come along.
"""

import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import checkpoint_checks as checks
from tests.distributed.cases import Outcome, merged
from tests.distributed.checkpoint_checks import Layout
from tests.distributed.marks import quick
from tests.distributed.test_checkpoint import assert_same_bits

pytestmark = pytest.mark.distributed

HELD = {
    "moe": {"router": {"target_load": 1.2}},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"micro_batch_size": 1},
}
FAMILY = {
    "model": {"num_query_groups": 2, "head_dim": 12, "qk_norm": "all", "qkv_bias": True},
    "moe": {
        "dense_layers": [1],
        "shared_expert_hidden_size": 16,
        "shared_expert_gate": True,
        "router": {"normalize": "all_true"},
    },
}
PLACES = {
    "alone": (1, Layout(changes=HELD)),
    "data 2": (2, Layout(changes=HELD)),
    "expert 2": (2, Layout(expert_parallel=2, changes=HELD)),
    "expert 4": (4, Layout(expert_parallel=4, changes=HELD)),
    "tensor 2": (2, Layout("auto", changes=merged(HELD, {"parallel": {"tensor": 2}}))),
    "family, alone": (1, Layout(changes=merged(HELD, FAMILY))),
    "family, tensor 2": (2, Layout("auto", changes=merged(HELD, merged(FAMILY, {"parallel": {"tensor": 2}})))),
    "pipeline 2": (2, Layout(stage=2, changes=merged(HELD, {"model": {"num_layers": 4}, "parallel": {"pipeline": 2}}))),
    "alone, 4 layers": (1, Layout(changes=merged(HELD, {"model": {"num_layers": 4}}))),
    "stage 2": (2, Layout(expert_parallel=2, stage=2, changes=HELD)),
    "stage 3": (2, Layout(expert_parallel=2, stage=3, changes=HELD)),
}
MOVES = [
    ("expert 2", "expert 4"),
    ("expert 4", "expert 2"),
    ("data 2", "alone"),
    ("alone", "data 2"),
    ("tensor 2", "alone"),
    ("family, tensor 2", "family, alone"),
    ("pipeline 2", "alone, 4 layers"),
    ("expert 2", "stage 2"),
    ("stage 2", "stage 3"),
    ("stage 3", "expert 2"),
]
QUICK = [
    ("tensor 2", "alone"),
    ("family, tensor 2", "family, alone"),
    ("pipeline 2", "alone, 4 layers"),
    ("stage 2", "stage 3"),
]
"""Data 2 to alone is in the test of the data's order."""


@pytest.fixture(scope="module")
def source_of(ranks_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``source_of(place)``: a checkpoint after two steps there, and what two more steps there give; each made once."""
    made: dict[str, tuple[Path, Outcome]] = {}

    def get(place: str) -> tuple[Path, Outcome]:
        if place not in made:
            world, layout = PLACES[place]
            root = tmp_path_factory.mktemp("elastic")
            outcome = ranks_of(world).run(checks.train_and_save, layout, root, 2, 2)[0]
            made[place] = root / "iter_0000002", outcome
        return made[place]

    return get


@pytest.mark.parametrize(("there", "here"), quick(MOVES, QUICK))
def test_moved_run_is_the_unbroken_one_and_comes_back_with_the_same_bits(
    ranks_of: Any, source_of: Any, tmp_path: Path, there: str, here: str
) -> None:
    path, expected = source_of(there)
    assert expected.biases and all(bool(bias.any()) for bias in expected.biases.values())
    (old_world, old), (new_world, new) = PLACES[there], PLACES[here]
    moved = [outcome for outcome, _ in ranks_of(new_world).run(checks.resume, new, path, 2, tmp_path)]
    assert moved[0].losses == pytest.approx(expected.losses, rel=1e-6)
    assert moved[0].norms == pytest.approx(expected.norms, rel=1e-4)
    biases = {name: bias for outcome in moved for name, bias in outcome.biases.items()}
    for name, bias in expected.biases.items():
        torch.testing.assert_close(biases[name], bias, rtol=1e-5, atol=1e-7)
    back = ranks_of(old_world).run(checks.resume, old, tmp_path / "iter_0000002", 2)[0][0]
    assert_same_bits(expected, back)
    assert all(torch.equal(back.biases[name], bias) for name, bias in expected.biases.items())


@pytest.mark.parametrize(("there", "here"), quick([("bf16", "fp32"), ("fp32", "bf16")], []))
def test_precision_may_change_and_change_back(ranks_of: Any, tmp_path: Path, there: str, here: str) -> None:
    """What the other precision loads is what was saved: masters, moments and biases to the bit. It trains on nearby."""
    layout = Layout(expert_parallel=2, stage=1, precision=there, changes=HELD)
    expected = ranks_of(2).run(checks.train_and_save, layout, tmp_path / "a", 2, 2)[0]
    other = dataclasses.replace(layout, precision=here)
    moved = ranks_of(2).run(checks.resume, other, tmp_path / "a" / "iter_0000002", 2, tmp_path / "b")[0][0]
    assert moved.losses == pytest.approx(expected.losses, rel=1e-2)
    back = ranks_of(2).run(checks.resume, layout, tmp_path / "b" / "iter_0000002", 2)[0][0]
    assert_same_bits(expected, back)


def by_step(of_ranks: list[list[list[int]]]) -> list[list[int]]:
    """The samples of each step over all ranks, in the order of their numbers."""
    return [sorted(chain.from_iterable(step)) for step in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize(
    ("there", "here", "micro"),
    quick([("data 2", "alone", 2), ("alone", "data 2", 4), ("expert 2", "expert 4", 2)], [("data 2", "alone", 2)]),
)
def test_data_goes_on_where_it_was(ranks_of: Any, tmp_path: Path, there: str, here: str, micro: int) -> None:
    """Samples 0, 1, 2 ... are used once each, eight a step, however they are shared out; the losses are the same."""
    (old_world, old), (new_world, new) = PLACES[there], PLACES[here]
    scope = {"moe": {"router": {"balance": {"type": "none"}}}}  # a balance loss depends on the micro-batch
    old = dataclasses.replace(old, changes=merged(old.changes, scope))
    new = dataclasses.replace(new, changes=merged(new.changes, merged(scope, {"train": {"micro_batch_size": micro}})))
    before = ranks_of(old_world).run(checks.train_on_stream, old, tmp_path, range(4), None, 2)
    after = ranks_of(new_world).run(checks.train_on_stream, new, tmp_path, range(2, 4), tmp_path / "iter_0000002")
    unbroken, continued = by_step([seen for seen, _ in before]), by_step([seen for seen, _ in after])
    assert unbroken == [list(range(8 * step, 8 * step + 8)) for step in range(4)]
    assert continued == unbroken[2:]
    if old_world > 1:
        assert len({tuple(seen[0]) for seen, _ in before}) == old_world
    assert after[0][1].losses == pytest.approx(before[0][1].losses[2:], rel=1e-6)


def test_megatrons_own_loader_reads_a_checkpoint(ranks_of: Any, source_of: Any) -> None:
    """Whole and in halves, an expert matrix that two ranks wrote, and a moment."""
    path, _ = source_of("expert 2")
    expected = ranks_of(1).run(checks.tensors_of, PLACES["alone"][1], path)[0]
    names = [name for name in expected if ".experts." in name and expected[name].dim() == 3][:2]
    moments = [name for name in expected if name.startswith("optimizer.exp_avg_sq.") and ".experts." in name][:1]
    assert len(names) == 2 and moments
    for name in (*names, *moments):
        for rank, (whole, half) in enumerate(ranks_of(2).run(checks.read_by_megatron, path, name)):
            assert torch.equal(whole, expected[name])
            assert torch.equal(half, expected[name].chunk(2)[1 - rank])


def test_generators_go_on_on_every_rank(ranks_of: Any, tmp_path: Path) -> None:
    answers = ranks_of(2).run(checks.generators_go_on, Layout(), tmp_path)
    for expected, found in answers:
        assert found == expected
    assert answers[0][0] != answers[1][0]
