"""Routing over ranks: balance over the global batch, recompute, the router's options, scores that are not finite."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.distributed import checkpoint_checks as checks
from tests.distributed.cases import merged, train
from tests.distributed.matrix import apart, worst
from tests.distributed.test_equality import assert_same_training
from tests.model.layers import config_of, hidden_states, layer_of

pytestmark = pytest.mark.distributed

ROUTER = {"z_loss_coefficient": 0.0, "balance": {"coefficient": 0.5}}
COMMON = {
    "train": {"global_batch_size": 8, "gradient_clipping": 0.5},
    "optimizer": {"learning_rate": 1e-3},
    "moe": {"router": ROUTER},
}
STEPS = 3


def with_micro_batch(changes: dict[str, Any], size: int) -> dict[str, Any]:
    return merged(merged(COMMON, changes), {"train": {"micro_batch_size": size}})


def scoped(scope: str, **balance: Any) -> dict[str, Any]:
    return {"moe": {"router": {"balance": {"scope": scope, **balance}}}}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["null_averaged", "grouped"])
@pytest.mark.parametrize("expert_parallel", [1, 2], ids=["DP2", "EP2"])
def test_two_ranks_balance_as_one_with_twice_the_micro_batch(ranks_of, expert_parallel, kind, padded):
    changes = scoped("global_batch", type=kind)
    single = ranks_of(1).run(train, with_micro_batch(changes, 2), STEPS, 1, "fp32", None, padded)[0]
    outcomes = ranks_of(2).run(train, with_micro_batch(changes, 1), STEPS, expert_parallel, "fp32", None, padded)
    assert_same_training(outcomes, single)
    assert min(single.balance_losses) > 0.5


def test_by_micro_batch_they_do_not(ranks_of):
    """The comparison above must be able to fail."""
    changes = scoped("micro_batch")
    single = ranks_of(1).run(train, with_micro_batch(changes, 2), 1, 1, "fp32", None, True)[0]
    outcome = ranks_of(2).run(train, with_micro_batch(changes, 1), 1, 1, "fp32", None, True)[0]
    assert worst(outcome.losses, single.losses) < 1e-5
    name = "decoder.layers.0.mlp.router.null_weight"
    assert apart(outcome.gradients[name], single.gradients[name], single.gradients[name]) > 1e-3


OPTIONS = {
    "sigmoid": {"router": {"score_function": "sigmoid"}},
    "null_types": {"null_types": {"identity": 2, "constant": 3}},
    "gating_residual": {"router": {"gating_residual": True}},
    "capacity": {"router": {"capacity_factor": 0.9}},
    "sigmoid_target": {"router": {"score_function": "sigmoid", "target_load": 1.2}, "null_types": {"identity": 3}},
    "allgather": {"dispatcher": {"type": "allgather"}, "shared_expert_hidden_size": 32},
    "overlap": {"shared_expert_hidden_size": 32},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_alike_on_two_ranks(ranks_of, name):
    """The same micro-batches on both, so that each rank's capacity is that of the one process.

    A constant expert's mixture first learns from the product of the token with its gradient. In the last layer, under a
    norm whose gradient is orthogonal to what it normalises, that is nearly zero: a difference of large numbers.
    """
    changes = with_micro_batch({"moe": OPTIONS[name]}, 1)
    single = ranks_of(1).run(train, changes, STEPS, 1)[0]
    outcomes = ranks_of(2).run(train, changes, STEPS, 2)
    for mixture in [weight for weight in single.gradients if weight.endswith("mixture_weight")]:
        exact = single.gradients.pop(mixture)
        assert all(apart(outcome.gradients.pop(mixture), exact, exact) < 1e-3 for outcome in outcomes)
    assert_same_training(outcomes, single)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_fixed_shapes_compute_what_the_capacity_leaves(ranks_of, policy):
    """Padding to the capacity, on two ranks, against rows of any number in one process."""
    capacity = {"router": {"capacity_factor": 0.9, "drop_policy": policy}}
    fixed = merged(capacity, {"dispatcher": {"pad_to_capacity": True}})
    single = ranks_of(1).run(train, with_micro_batch({"moe": capacity}, 1), STEPS, 1)[0]
    outcomes = ranks_of(2).run(train, with_micro_batch({"moe": fixed}, 1), STEPS, 2)
    assert_same_training(outcomes, single)


def recomputed_layer(recomputed: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and sums of one layer with its experts over all ranks."""
    from megatron.core import tensor_parallel

    from adamoe_dist.parallel import Launch, destroy_groups, initialize_groups
    from tests.distributed.cases import counted

    launch = Launch.from_environment()
    degrees = {"parallel": {"expert": launch.world_size}}
    initialize_groups(launch, config_of(degrees, launch.world_size)[1])
    try:
        moe = {"router": merged(ROUTER, {"balance": {"scope": "global_batch"}})}
        layer = layer_of({"moe": moe}, launch.world_size)
        layer.train()
        for number in range(2):
            hidden = hidden_states(2 * number + launch.rank).requires_grad_()
            output = (
                tensor_parallel.checkpoint(lambda x: layer(x)[0], False, hidden) if recomputed else layer(hidden)[0]
            )
            output.square().sum().backward()
        return {name: p.grad for name, p in layer.named_parameters()}, counted(layer)[0]
    finally:
        destroy_groups()


def test_recompute_counts_rows_and_loads_once(ranks_of):
    twice, once = ranks_of(2).run(recomputed_layer, True), ranks_of(2).run(recomputed_layer, False)
    for (gradients, sums), (expected, expected_sums) in zip(twice, once, strict=True):
        assert sums == expected_sums and sums["dispatch_rows"] > 0 and sums["balance_loss"] > 0
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-6)


def test_weights_of_the_options_are_saved_and_resumed(ranks_of, tmp_path):
    """bf16, so that what is loaded are the fp32 masters; then in one process from the same files."""
    moe = {"null_types": {"identity": 2, "constant": 3}, "router": {"gating_residual": True}}
    layout = checks.Layout(expert_parallel=2, precision="bf16", changes={"moe": moe})
    saved = ranks_of(2).run(checks.train_and_save, layout, tmp_path, 2, 2)[0]
    resumed, _ = ranks_of(2).run(checks.resume, layout, tmp_path / "iter_0000002", 2)[0]
    assert saved.losses == resumed.losses and saved.norms == resumed.norms
    for name, weight in saved.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    ours = [name for name in saved.weights if "null_experts" in name or "gating_residual" in name]
    assert len(ours) == 3 * 2 + 2 and all(saved.weights[name].norm() > 0 for name in ours)
    alone = dataclasses.replace(layout, expert_parallel=1)
    single, _ = ranks_of(1).run(checks.resume, alone, tmp_path / "iter_0000002", 2)[0]
    assert worst(single.losses, saved.losses) < 1e-3


class Samples:
    """Batches of this rank as the loop asks for them."""

    consumed_samples = 8

    def next_step(self) -> list[Any]:
        from adamoe_dist.data import MicroBatch

        return [MicroBatch(torch.zeros(1, 33, dtype=torch.long)) for _ in range(4)]

    def describe(self, first_sample: int) -> str:
        return f"samples {first_sample} to {first_sample + 7} of the data order"


def poisoned_run(layers: list[int]) -> str:
    """Train one step in which rank 1 alone has NaN in some layers' routers; return what stops it."""
    from adamoe_dist import platform
    from adamoe_dist.errors import NumericalError
    from adamoe_dist.model import build_model
    from adamoe_dist.parallel import Launch, TrainingEngine, destroy_groups, initialize_groups
    from adamoe_dist.training.loop import Trainer

    launch = Launch.from_environment()
    config, resolved = config_of(with_micro_batch({"train": {"max_bad_steps": 1}}, 1), launch.world_size)
    initialize_groups(launch, resolved)
    try:
        platform.seed_everything(1, deterministic=False)
        model = build_model(config, resolved, 96, torch.float32, cuda=False).model
        engine = TrainingEngine(model, config, resolved, torch.float32, config.moe.num_experts)
        if launch.rank == 1:
            with torch.no_grad():
                for layer in layers:
                    model.moe_layers[layer].router.weight[0, 0] = float("nan")
        before = [parameter.detach().clone() for parameter in model.parameters()]
        batches: Any = Samples()
        trainer = Trainer(config, resolved, engine, model, batches, launch.rank, torch.device("cpu"), torch.float32, [])
        try:
            trainer.run()
        except NumericalError as stop:
            unchanged = all(
                torch.equal(a, b) or b.isnan().any() for a, b in zip(model.parameters(), before, strict=True)
            )
            return f"{stop}; weights {'as before' if unchanged else 'changed'}"
        finally:
            engine.close()
        return "no error"
    finally:
        destroy_groups()


def test_nan_scores_stop_all_ranks_before_the_step_and_name_the_first_layer(ranks_of):
    """Layer 2 of 3, as Megatron numbers them; layer 3 inherits the NaN. 4 micro-batches of 32 tokens on one rank."""
    stops = ranks_of(2).run(poisoned_run, [1])
    assert stops[0] == stops[1]
    assert stops[0].startswith(
        "the router of layer 2 gives NaN or infinite scores for 128 tokens of step 1; its batch is samples 8 to 15 of "
    )
    assert stops[0].endswith("weights as before")
