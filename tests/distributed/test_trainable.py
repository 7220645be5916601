"""Frozen weights and adapters, in every layout and ZeRO stage."""

import pytest
import torch

from tests.distributed.cases import merged, train
from tests.distributed.marks import quick
from tests.distributed.matrix import COMMON, LAYOUTS, SGD, deviation

pytestmark = pytest.mark.distributed

STEPS = 2
CELLS = [("TP2 EP2", 1), ("PP2", 2), ("EP2", 3)]
CHANGES = merged(merged(COMMON, SGD), {"train": {"micro_batch_size": 2, "gradient_clipping": 0.05}})
ROUTER_AND_NORMS = {"finetune": {"trainable": ["router", "norms"]}}
LORA = {"finetune": {"lora": {"rank": 4, "alpha": 8.0}}, "optimizer": {"learning_rate": 1.0}}
LORA_AND_ROUTER = merged(LORA, {"finetune": {"trainable": ["router"]}})


def run(ranks, degrees, *changes, steps=STEPS, precision="fp32"):
    tree = CHANGES
    for change in changes:
        tree = merged(tree, change)
    return ranks.run(train, tree, steps, degrees, precision, None, False, 0.0, True)


def changed(outcome):
    return {name for name, weight in outcome.weights.items() if not torch.equal(weight, outcome.initial[name])}


@pytest.mark.parametrize(("layout", "stage"), quick([*CELLS, ("EP2", 0), ("CP2", 1), ("ETP2", 2)], CELLS))
def test_only_what_is_named_is_trained_and_alike_everywhere(ranks_of, layout, stage):
    world, degrees = LAYOUTS[layout]
    tied = {"model": {"tie_embeddings": True}}
    (single,) = run(ranks_of(1), {"expert": 1}, ROUTER_AND_NORMS, tied)
    outcomes = run(ranks_of(world), degrees, ROUTER_AND_NORMS, tied, {"zero": {"stage": stage}})
    trained = {name for name in single.weights if ".mlp.router." in name or "layernorm" in name}
    assert len(trained) == 4 * 4 + 1
    assert changed(single) == changed(outcomes[0]) == trained
    found = deviation(outcomes[0], single)
    assert max(found.losses, found.norms, found.weights) < 1e-5


@pytest.mark.parametrize(("layout", "stage"), quick([*CELLS, ("EP2", 0), ("TP2", 2), ("CP2 EP2", 1)], CELLS))
def test_adapters_are_trained_alike_everywhere(ranks_of, layout, stage):
    world, degrees = LAYOUTS[layout]
    (single,) = run(ranks_of(1), {"expert": 1}, LORA)
    outcomes = run(ranks_of(world), degrees, LORA, {"zero": {"stage": stage}})
    assert changed(single) == changed(outcomes[0]) == {name for name in single.weights if ".lora." in name}
    assert len(changed(single)) == 4 * (4 + 4)
    found = deviation(outcomes[0], single)
    assert max(found.losses, found.norms, found.weights) < 1e-5


def test_the_first_output_is_the_base_models(ranks_of):
    (base,) = run(ranks_of(1), {"expert": 1}, steps=1)
    (adapted,) = run(ranks_of(1), {"expert": 1}, LORA, steps=1)
    assert adapted.losses == base.losses
    assert all(torch.equal(adapted.initial[name], value) for name, value in base.initial.items())


def test_a_frozen_embedding_does_not_cut_off_recomputed_layers(ranks_of):
    (kept,) = run(ranks_of(1), {"expert": 1}, LORA_AND_ROUTER)
    (recomputed,) = run(ranks_of(1), {"expert": 1}, LORA_AND_ROUTER, {"train": {"recompute": "full"}})
    found = deviation(recomputed, kept)
    assert max(found.losses, found.norms, found.weights) < 1e-6


def refusal_of(changes, degrees):
    from adamoe_dist.errors import UserError

    try:
        train(merged(CHANGES, changes), 1, degrees)
    except UserError as refusal:
        return str(refusal)
    return None


def test_patterns_that_match_nothing_are_refused_with_what_is_near(ranks_of):
    (message,) = ranks_of(1).run(refusal_of, {"finetune": {"trainable": ["routers"]}}, {"expert": 1})
    assert message.startswith("finetune.trainable names 'routers', which matches no weight") and "router" in message
    messages = ranks_of(2).run(refusal_of, {"finetune": {"trainable": ["decoder.layers.0.*"]}}, {"pipeline": 2})
    assert set(messages) == {
        "finetune.trainable trains nothing on pipeline stage 2; name a weight there too, such as norms, or set "
        "parallel.pipeline=1"
    }


@pytest.mark.parametrize("stage", quick([0, 1, 2, 3], [2]))
def test_frozen_weights_and_adapters_are_in_checkpoints(ranks_of, tmp_path, stage):
    """Saved in one stage by two ranks and continued in another by one, as if never left."""
    tree = merged(LORA_AND_ROUTER, {"optimizer": {"learning_rate": 1e-3}})
    (going_on,) = ranks_of(1).run(save_and_go_on, {**tree, "zero": {"stage": 1}}, 1, None, 4)
    outcomes = ranks_of(2).run(save_and_go_on, {**tree, "zero": {"stage": stage}}, 2, tmp_path, 2)
    (continued,) = ranks_of(1).run(continue_from, {**tree, "zero": {"stage": (stage + 1) % 4}}, 1, tmp_path)
    assert outcomes[0].losses == pytest.approx(going_on.losses[:2], rel=1e-5)
    assert continued.losses == pytest.approx(going_on.losses[2:], rel=1e-5)
    for name, weight in going_on.weights.items():
        torch.testing.assert_close(continued.weights[name], weight, rtol=1e-4, atol=2e-4, msg=name)


def save_and_go_on(changes, expert, root, steps):
    from tests.distributed.checkpoint_checks import Layout, started

    with started(Layout(expert_parallel=expert, changes=changes), seed=7) as run:
        outcome = run.advance(range(steps))
        if root is not None:
            run.save(root, steps)
        return outcome


def continue_from(changes, expert, root):
    from adamoe_dist.checkpoint import load_checkpoint
    from tests.distributed.checkpoint_checks import Layout, started

    with started(Layout(expert_parallel=expert, changes=changes), seed=99) as run:
        load_checkpoint(root / "iter_0000002", run.engine)
        return run.advance(range(2, 4))


def test_merged_adapters_give_the_same_logits(ranks_of, tmp_path):
    """The base model takes the merged weights; and adapters start anew on weights that have none."""
    (differences,) = ranks_of(1).run(merge_and_compare, LORA, tmp_path)
    adapted_vs_base, merged_vs_adapted, loaded_vs_adapted, fresh_vs_base = differences
    assert adapted_vs_base > 1e-2 and merged_vs_adapted < 1e-5 and fresh_vs_base == 0.0
    assert loaded_vs_adapted < 1e-5, "a run without adapters takes them into its weights"


def merge_and_compare(changes, root):
    from adamoe_dist.checkpoint import load_weights, merge_lora
    from adamoe_dist.checkpoint.index import read_index, read_tensor
    from adamoe_dist.model import parts_of
    from tests.distributed.cases import tokens_of
    from tests.distributed.checkpoint_checks import Layout, started

    tokens = tokens_of(9, 2, 32)[:, :-1]

    def logits(run):
        run.engine.eval()
        with torch.no_grad():
            return run.engine.model.logits(tokens)

    with started(Layout(), seed=7) as run:
        base = logits(run)
        run.save(root, 1)
    with started(Layout(changes=changes), seed=99) as run:
        load_weights(root / "iter_0000001", run.engine)
        fresh = logits(run)
        run.advance(range(3))
        adapted = logits(run)
        path = run.save(root, 2)
    index = read_index(path)
    names = [name.removeprefix("model.") for name in index if name.startswith("model.")]
    tensors = merge_lora({name: read_tensor(path, index, f"model.{name}") for name in names}, alpha=8.0)
    with started(Layout(), seed=7) as run:
        parts = parts_of(run.engine.model)
        assert parts.keys() == tensors.keys()
        for name, part in parts.items():
            part.parameter.data.copy_(tensors[name])
        together = logits(run)
    with started(Layout(), seed=99) as run:
        load_weights(path, run.engine)
        loaded = logits(run)
    pairs = ((adapted, base), (together, adapted), (loaded, adapted), (fresh, base))
    return [float((a - b).abs().max()) for a, b in pairs]


def test_weights_of_megatrons_router_give_the_same_loss_with_adamoes(ranks_of, tmp_path):
    (losses,) = ranks_of(1).run(first_losses_of_both_routers, tmp_path)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def first_losses_of_both_routers(root):
    from adamoe_dist.checkpoint import load_weights
    from tests.distributed.checkpoint_checks import Layout, started

    plain = {"moe": {"num_null_experts": 0, "top_k": 2, "router": {"type": "topk", "balance": {"type": "switch"}}}}
    with started(Layout(changes=plain), seed=7) as run:
        run.advance(range(2))
        path = run.save(root, 2)
        theirs = run.advance(range(2, 3)).losses
    with started(Layout(changes=merged(plain, {"moe": {"router": {"type": "adamoe"}}})), seed=99) as run:
        load_weights(path, run.engine)
        return [*theirs, *run.advance(range(2, 3)).losses]
