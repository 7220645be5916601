"""The controller of the load: the same bits on every rank, in every layout, and after a resumed run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import checkpoint_checks as checks
from tests.distributed.cases import Outcome, merged, train
from tests.distributed.checkpoint_checks import Layout

pytestmark = pytest.mark.distributed

HELD = {"moe": {"router": {"target_load": 1.2}}}
COMMON = merged(
    HELD,
    {
        "train": {"global_batch_size": 8, "micro_batch_size": 1, "steps": 6},
        "optimizer": {"learning_rate": 1e-3},
    },
)


def assert_same_biases(first: Outcome, second: Outcome, layers: int = 3) -> None:
    assert first.biases.keys() == second.biases.keys() and len(first.biases) == layers
    for name, bias in first.biases.items():
        assert bias.dtype == torch.float32 and bias.abs().max() > 0 and bias.unique().numel() > 1, name
        assert torch.equal(bias, second.biases[name]), name


@pytest.mark.parametrize("balance", ["null_averaged", "none"])
@pytest.mark.parametrize(("world", "expert_parallel"), [(2, 2), (2, 1), (4, 2)], ids=["EP2", "DP2", "EP2xEDP2"])
def test_biases_are_bitwise_those_of_one_process(ranks_of, world, expert_parallel, balance) -> None:
    """Eight micro-batches a step, accumulated on one process, and spread over ranks."""
    changes = merged(COMMON, {"moe": {"router": {"balance": {"type": balance}}}})
    single = ranks_of(1).run(train, changes, 6, 1)[0]
    for outcome in ranks_of(world).run(train, changes, 6, expert_parallel):
        assert_same_biases(single, outcome)
        assert outcome.losses == pytest.approx(single.losses, rel=1e-5)


def test_the_bias_stays_fp32_in_bf16_training(ranks_of) -> None:
    outcomes = ranks_of(2).run(train, COMMON, 3, 2, "bf16")
    assert_same_biases(outcomes[0], outcomes[1])
    assert any((bias != bias.bfloat16().float()).any() for bias in outcomes[0].biases.values())


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_resumed_run_has_the_same_bits(ranks_of, tmp_path: Path, precision: str) -> None:
    layout = Layout(expert_parallel=2, precision=precision, changes=HELD)
    expected = ranks_of(2).run(checks.train_and_save, layout, tmp_path, 2, 2)[0]
    outcome, _ = ranks_of(2).run(checks.resume, layout, tmp_path / "iter_0000002", 2)[0]
    assert outcome.losses == expected.losses and outcome.norms == expected.norms
    assert_same_biases(outcome, expected)
    alone = Layout(precision=precision, changes=HELD)
    on_one = ranks_of(1).run(checks.resume, alone, tmp_path / "iter_0000002", 0)[0][0]
    before = ranks_of(2).run(checks.resume, layout, tmp_path / "iter_0000002", 0)[0][0]
    assert_same_biases(on_one, before)


def loaded_weights(layout: Layout, path: Path) -> tuple[list[str], dict[str, torch.Tensor], torch.Tensor]:
    """Take weights only: the buffers that were not there, the biases, and the logits of evaluation."""
    from adamoe_dist.checkpoint import load_weights
    from tests.distributed.cases import biases_of, tokens_of

    with checks.started(layout, seed=99) as run:
        missing = load_weights(path, run.engine)
        run.engine.eval()
        with torch.no_grad():
            return missing, biases_of(run.engine.model), run.engine.model.logits(tokens_of(50, 2, 16))


def test_load_weights_takes_the_bias_with_them(ranks_of, tmp_path: Path) -> None:
    held, free = Layout(changes=HELD), Layout()
    expected = ranks_of(1).run(checks.logits_after_training, held, tmp_path / "held")[0]
    ranks_of(1).run(checks.logits_after_training, free, tmp_path / "free")
    missing, biases, logits = ranks_of(1).run(loaded_weights, held, tmp_path / "held" / "iter_0000002")[0]
    assert not missing and torch.equal(logits, expected)
    assert all(bias.abs().max() > 0 for bias in biases.values())
    missing, biases, _ = ranks_of(1).run(loaded_weights, held, tmp_path / "free" / "iter_0000002")[0]
    assert len(missing) == 3 and all(name.endswith("router.expert_bias") for name in missing)
    assert all(bias.eq(0).all() for bias in biases.values())
    for weights_only in (False, True):
        message = ranks_of(1).run(checks.refused_load, free, tmp_path / "held" / "iter_0000002", weights_only)[0]
        assert "tensor model.decoder.layers.0.mlp.router.expert_bias has no place here" in message
    message = ranks_of(1).run(checks.refused_load, held, tmp_path / "free" / "iter_0000002")[0]
    assert "tensor model.decoder.layers.0.mlp.router.expert_bias is missing" in message


def save_unequal(layout: Layout, root: Path) -> str:
    """Save with one rank's bias changed by a bit."""
    from adamoe_dist.checkpoint import CheckpointError

    with checks.started(layout) as run:
        if run.launch.rank == 1:
            run.engine.model.moe_layers[1].router.expert_bias[3] += 1e-7
        try:
            run.save(root, 1)
        except CheckpointError as problem:
            return str(problem)
    return "saved"


def test_a_bias_that_differs_between_ranks_is_not_saved(ranks_of, tmp_path: Path) -> None:
    messages: list[Any] = ranks_of(2).run(save_unequal, Layout(expert_parallel=2, changes=HELD), tmp_path)
    assert messages[0] == messages[1]
    assert "buffer decoder.layers.1.mlp.router.expert_bias of rank 1 is not that of rank 0" in messages[0]
    assert not list(tmp_path.glob("iter_*[0-9]"))
