"""A loss of some tokens only: the mean over them in the whole global batch, however the batch is cut."""

import pytest
import torch

from tests.distributed.cases import BASE, VOCAB, loss_mask_of, merged, padding_of, tokens_of, train
from tests.distributed.marks import quick
from tests.distributed.matrix import COMMON, LAYOUTS, SGD, deviation

pytestmark = pytest.mark.distributed

STEPS = 2
CHANGES = merged(merged(COMMON, SGD), {"zero": {"stage": 2}, "train": {"micro_batch_size": 2}})
BATCH, LENGTH = COMMON["train"]["global_batch_size"], COMMON["model"]["sequence_length"]
PLAIN = {"moe": {"router": {"balance": {"type": "none"}}}}
"""The balance loss counts loads over a micro-batch, so that it does depend on its size."""
GLOBAL = {"moe": {"router": {"balance": {"scope": "global_batch"}}}}
CELLS = quick(["DP2", "TP2 EP2", "CP2", "PP2", "ETP2"], ["TP2 EP2", "CP2", "PP2"])


def run(ranks, changes, degrees, **keywords):
    return ranks.run(train, merged(CHANGES, changes), STEPS, degrees, "fp32", None, False, 0.0, True, **keywords)


@pytest.mark.parametrize("layout", CELLS)
def test_every_layout_has_the_same_loss_and_gradients(ranks_of, layout):
    world, degrees = LAYOUTS[layout]
    (single,) = run(ranks_of(1), {}, {"expert": 1})
    outcomes = run(ranks_of(world), {}, degrees)
    found = deviation(outcomes[-1], single)
    assert max(found.losses, found.norms, found.weights, found.gradients) < 1e-5
    assert outcomes[0].balance_losses == pytest.approx(single.balance_losses, rel=1e-5)


@pytest.mark.parametrize("micro", quick([1, 3, 12], [1, 12]))
def test_the_cut_into_micro_batches_does_not_matter(ranks_of, micro):
    """Of micro-batches of one sample some have no token with a loss."""
    tokens = tokens_of(0, BATCH, LENGTH)
    assert (loss_mask_of(tokens).sum(dim=1) == 0).any()
    (single,) = run(ranks_of(1), PLAIN, {"expert": 1})
    for ranks in (1, 2):
        if micro * ranks <= BATCH:
            changes = merged(PLAIN, {"train": {"micro_batch_size": micro}})
            found = deviation(run(ranks_of(ranks), changes, {"expert": 1})[0], single)
            assert max(found.losses, found.norms, found.weights, found.gradients) < 1e-5, (micro, ranks)


def test_loads_over_the_global_batch_weigh_every_real_token_alike(ranks_of):
    """In one round over all ranks the balance loss is that of one process that has the whole batch at once."""
    whole = merged(GLOBAL, {"train": {"micro_batch_size": 12}})
    (single,) = run(ranks_of(1), whole, {"expert": 1})
    outcomes = run(ranks_of(2), merged(GLOBAL, {"train": {"micro_batch_size": 6}}), {"expert": 2})
    found = deviation(outcomes[0], single)
    assert max(found.losses, found.norms, found.weights, found.gradients) < 1e-5
    assert outcomes[0].balance_losses == pytest.approx(single.balance_losses, rel=1e-5)


def test_the_loss_is_the_mean_over_the_tokens_that_count(ranks_of):
    changes = merged(PLAIN, {"moe": {"router": {"z_loss_coefficient": 0.0}}})
    (single,) = run(ranks_of(1), changes, {"expert": 1})
    ((loss, gradients),) = ranks_of(1).run(slow_reference, merged(CHANGES, changes))
    assert single.losses[0] == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(single.gradients[name], gradient, rtol=1e-4, atol=1e-7)


def slow_reference(changes):
    """The loss and its gradients of the first global batch at once, by plain torch, without z-loss."""
    from adamoe_dist import platform
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups
    from tests.distributed.cases import gathered

    launch = Launch.from_environment()
    config = config_from_dict(merged(BASE, changes))
    resolved = resolve(config, 1)
    initialize_groups(launch, resolved)
    try:
        platform.seed_everything(config.run.seed, deterministic=False)
        model = build_model(config, resolved, VOCAB, torch.float32, cuda=False).model
        tokens = tokens_of(0, BATCH, LENGTH)
        losses = model(tokens, padding_of(tokens))
        mask = loss_mask_of(tokens)
        loss = losses[mask].sum() / mask.sum()
        loss.backward()
        named = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        return float(loss), gathered(model, named)
    finally:
        destroy_groups()
