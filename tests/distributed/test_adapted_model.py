"""A model with experts that gets null experts, its output preserved: training brings its load to the target."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import checkpoint_checks as checks
from tests.distributed.cases import counted, merged
from tests.distributed.checkpoint_checks import Layout

pytestmark = pytest.mark.distributed

TARGET = 1.25


def save_olmoe(directory: Path, training: dict[str, Any]) -> None:
    """OLMoE's class with random weights, after some steps on the text that it is then adapted on."""
    import torch

    from tests.convert.models import save
    from tests.distributed.cases import tokens_of

    model = save(directory, "olmoe", num_experts=8, num_experts_per_tok=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(40):
        tokens = tokens_of(step, training["global_batch_size"], 32)[:, :32]
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def adapt(directory: Path, root: Path, training: dict[str, Any], steps: int) -> tuple[list[float], list[list[float]]]:
    """Import, load, train: the loss of each step, and every layer's load in it."""
    from adamoe_dist.checkpoint import load_weights, read_config
    from adamoe_dist.convert import NullChoice, import_model, plan_import, with_null_experts

    choice = NullChoice(8, target_load=TARGET, preserves_output=True)
    path = import_model(with_null_experts(plan_import(directory), choice), root)
    tree = read_config(path)
    changes = {"model": tree["model"] | {"sequence_length": 32}, "moe": tree["moe"], "train": training}
    changes["moe"]["router"]["balance"]["type"] = "none"
    more = {"schedule": {"total_steps": steps}, "optimizer": {"learning_rate": 1e-3}}
    losses, loads = [], []
    with checks.started(Layout(changes=merged(changes, more)), seed=99) as run:
        assert not load_weights(path, run.engine)
        for step in range(steps):
            losses += run.advance(range(step, step + 1)).losses
            by_load = [counted(layer)[1][0] for layer in run.engine.model.moe_layers]
            loads.append([sum(k * count for k, count in enumerate(one)) / sum(one) for one in by_load])
    return losses, loads


@pytest.mark.slow
def test_the_load_goes_from_the_models_own_to_the_target(ranks_of: Any, tmp_path: Path) -> None:
    training = {"global_batch_size": 16, "micro_batch_size": 16}
    (_,) = ranks_of(1).run(save_olmoe, tmp_path / "olmoe", training)
    ((losses, loads),) = ranks_of(1).run(adapt, tmp_path / "olmoe", tmp_path / "adapted", training, 200)
    assert loads[0] == [2.0, 2.0], "no null expert is selected in the first step"
    last = [sum(column) / 20 for column in zip(*loads[-20:], strict=True)]
    print([[round(load, 2) for load in step] for step in loads[:12]], last, [round(x, 3) for x in losses[:24]])
    assert last == pytest.approx([TARGET, TARGET], rel=0.04)
    assert max(losses) < losses[0] + 0.3 and losses[-1] < losses[0] + 0.05
