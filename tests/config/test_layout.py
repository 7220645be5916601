"""Degrees of parallelism: the arithmetic, the explanation, and what is refused."""

import pytest

from adamoe_dist.config import Layout, resolve
from tests.config.test_validate import refusal, tree

MODEL = {"num_layers": 4, "num_attention_heads": 8, "hidden_size": 128, "sequence_length": 128}


def layout(world_size: int, **degrees: int | str) -> Layout:
    return resolve(tree(parallel=degrees, model=MODEL, train={"global_batch_size": 192}), world_size).layout


def test_the_degrees_of_both_halves_make_the_world() -> None:
    for world_size, degrees in (
        (1, {}),
        (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
        (16, {"tensor": 2, "context": 2, "expert": 8, "expert_tensor": 2}),
        (64, {"tensor": 4, "pipeline": 2, "context": 2, "expert": 8}),
    ):
        cut = layout(world_size, **degrees)
        assert cut.tensor * cut.pipeline * cut.context * cut.data == world_size
        assert cut.pipeline * cut.expert_tensor * cut.expert * cut.expert_data == world_size
        assert cut.replicas == cut.data * cut.context
        assert cut.stage_ranks * cut.pipeline == world_size


def test_experts_take_tensor_and_context_ranks_too() -> None:
    assert layout(4, tensor=2, context=2).expert == 4
    assert layout(4, tensor=2, pipeline=2).expert == 2
    assert layout(4, tensor=2, expert_tensor=2).expert == 2
    assert layout(12).expert == 4


@pytest.mark.parametrize(
    ("world_size", "degrees", "apart"),
    [
        (2, {"expert": 1}, False),
        (2, {"expert": 2}, True),
        (2, {"tensor": 2, "expert": 1}, True),
        (2, {"tensor": 2, "expert": 1, "expert_tensor": 2}, False),
        (2, {"expert": 1, "expert_tensor": 2}, True),
        (2, {"context": 2, "expert": 1}, False),
        (2, {"pipeline": 2, "expert": 1}, False),
    ],
)
def test_experts_are_apart_where_their_ranks_differ_from_the_dense_weights(world_size, degrees, apart) -> None:
    assert layout(world_size, **degrees).experts_are_apart is apart


def test_the_explanation_names_what_is_cut() -> None:
    assert layout(1).explain() == "1 = data 1 (experts: expert-parallel 1 x expert-data 1)"
    text = layout(16, tensor=2, pipeline=2, context=2, expert=2, expert_tensor=2).explain()
    assert text == (
        "16 = tensor 2 x pipeline 2 x context 2 x data 2, sequence-parallel "
        "(experts: expert-parallel 2 x expert-tensor 2 x expert-data 2)"
    )


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"parallel": {"tensor": 2}}, 3, "= 2 does not divide the world size 3; start a multiple of 2 ranks"),
        ({"parallel": {"tensor": 3}}, 3, "parallel.tensor=3 does not divide model.num_attention_heads=4"),
        (
            {"parallel": {"tensor": 4}, "model": {"num_query_groups": 2}},
            4,
            "parallel.tensor=4 does not divide model.num_query_groups=2",
        ),
        (
            {"parallel": {"tensor": 2}, "model": {"vocab_size_multiple": 1}},
            2,
            "does not divide model.vocab_size_multiple=1",
        ),
        (
            {"parallel": {"tensor": 2}, "moe": {"shared_expert_hidden_size": 33}},
            2,
            "does not divide moe.shared_expert_hidden_size=33",
        ),
        (
            {"parallel": {"tensor": 4}, "moe": {"layer_frequency": 2}, "model": {"ffn_hidden_size": 102}},
            4,
            "parallel.tensor=4 does not divide model.ffn_hidden_size=102",
        ),
        ({"parallel": {"tensor": 2}, "model": {"sequence_length": 127}}, 2, "model.sequence_length=127"),
        ({"parallel": {"pipeline": 3}}, 3, "parallel.pipeline=3 does not divide model.num_layers=4"),
        (
            {"parallel": {"pipeline": 4}, "moe": {"layer_frequency": 2}},
            4,
            "parallel.pipeline=4 leaves a stage of 1 layers without experts",
        ),
        (
            {"parallel": {"pipeline": 2}, "moe": {"dense_layers": [0, 1]}},
            2,
            "a stage of 2 layers without experts at moe.layer_frequency=1, moe.dense_layers=[0, 1]",
        ),
        (
            {"parallel": {"tensor": 4}, "moe": {"dense_layers": [0]}, "model": {"ffn_hidden_size": 102}},
            4,
            "parallel.tensor=4 does not divide model.ffn_hidden_size=102",
        ),
        (
            {"parallel": {"pipeline": 2}, "moe": {"router": {"gating_residual": True}}},
            2,
            "moe.router.gating_residual=true adds each router",
        ),
        ({"parallel": {"context": 8}}, 8, "parallel.context = 8 does not divide model.num_attention_heads=4"),
        (
            {"parallel": {"context": 2, "tensor": 2}, "model": {"num_query_groups": 2}},
            4,
            "= 4 does not divide model.num_query_groups=2",
        ),
        ({"parallel": {"context": 2}, "model": {"sequence_length": 127}}, 2, "model.sequence_length=127"),
        ({"parallel": {"expert_tensor": 3}}, 3, "parallel.expert_tensor=3 does not divide moe.expert_hidden_size"),
        ({"parallel": {"expert_tensor": 4, "pipeline": 2}}, 4, "does not divide the 2 ranks of a pipeline stage"),
        (
            {"parallel": {"expert": 4, "pipeline": 2}},
            4,
            "parallel.expert=4 does not divide the world size 4 / parallel.pipeline=2 / parallel.expert_tensor=1 = 2",
        ),
    ],
)
def test_refusals(changes: dict, world_size: int, expected: str) -> None:
    assert expected in refusal(tree(**changes), world_size)
