import pytest

from adamoe_dist.config import Config, config_from_dict, resolve
from adamoe_dist.errors import UserError
from tests.distributed.cases import merged

BASE = {"data": {"tokenizer": "t", "train": [{"path": "p"}]}}
TOPK = {"num_null_experts": 0, "router": {"type": "topk", "balance": {"type": "none"}}}


def tree(**changes) -> Config:
    return config_from_dict(merged(BASE, changes))


def topk_with(**router) -> dict:
    return {"moe": {"num_null_experts": 0, "router": {"type": "topk", "balance": {"type": "switch"}, **router}}}


def refusal(config: Config, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        resolve(config, world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("dispatcher", "chosen", "way_out"),
    [
        ({"type": "allgather"}, "type=allgather", "type=alltoall"),
        ({"type": "flex"}, "type=flex", "type=alltoall"),
        ({"pad_to_capacity": True}, "pad_to_capacity=true", "pad_to_capacity=false"),
    ],
)
def test_experts_are_cut_for_the_all_to_all_only(dispatcher: dict, chosen: str, way_out: str) -> None:
    moe = {"dispatcher": dispatcher, "router": {"capacity_factor": 1.0}}
    message = refusal(tree(moe=moe, parallel={"expert_tensor": 2}), 2)
    assert f"parallel.expert_tensor=2 cuts experts, whose rows moe.dispatcher.{chosen} does not gather" in message
    assert f"set parallel.expert_tensor=1 or moe.dispatcher.{way_out}" in message
    assert "cuts experts" not in refusal(tree(moe={**moe, "top_k": 17}), 1)
    assert "cuts experts" not in refusal(tree(moe={"top_k": 17}, parallel={"expert_tensor": 2}), 2)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../elsewhere", "/tmp/x"])
def test_the_name_of_a_run_is_that_of_a_directory(name: str) -> None:
    assert f"run.name={name!r} is to be the name of a directory" in refusal(tree(run={"name": name}))
    resolve(tree(run={"name": "a-1.5 b"}), 1)


def test_arithmetic_of_a_good_tree() -> None:
    config = tree(train={"global_batch_size": 48, "micro_batch_size": 3}, parallel={"expert": 4})
    resolved = resolve(config, 8)
    assert (resolved.data_parallel, resolved.expert_parallel, resolved.expert_data_parallel) == (8, 4, 2)
    assert resolved.micro_batches_per_rank == 2
    assert resolved.micro_batches_per_step == 16
    assert resolved.tokens_per_step == 48 * config.model.sequence_length


@pytest.mark.parametrize(("world_size", "expert_parallel"), [(1, 1), (2, 2), (3, 1), (6, 2), (8, 8), (16, 8)])
def test_auto_expert_parallelism_divides_ranks_and_experts(world_size: int, expert_parallel: int) -> None:
    resolved = resolve(tree(train={"global_batch_size": 48}), world_size)
    assert resolved.expert_parallel == expert_parallel


def test_auto_micro_batch_is_the_largest_divisor_within_the_token_limit() -> None:
    short = tree(train={"global_batch_size": 24}, model={"sequence_length": 128})
    assert resolve(short, 2).micro_batch_size == 12
    long = tree(train={"global_batch_size": 24}, model={"sequence_length": 4096})
    assert resolve(long, 2).micro_batch_size == 4
    huge = tree(train={"global_batch_size": 24}, model={"sequence_length": 65536})
    assert resolve(huge, 2).micro_batch_size == 1


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"moe": {"top_k": 17}}, 1, "moe.top_k=17 is more than the 16 experts"),
        ({"parallel": {"expert": 3}}, 3, "parallel.expert=3 does not divide moe.num_experts=8"),
        ({"parallel": {"expert": 2}}, 1, "parallel.expert=2 does not divide the world size 1"),
        ({"parallel": {"expert": 4}}, 6, "does not divide the world size 6"),
        ({"train": {"global_batch_size": 9}}, 2, "train.global_batch_size=9 does not divide over 2"),
        ({"train": {"global_batch_size": 1}}, 2, "train.global_batch_size=1 does not divide over 2"),
        (
            {"train": {"global_batch_size": 12, "micro_batch_size": 5}},
            2,
            "train.micro_batch_size=5 x 2 data-parallel ranks does not divide train.global_batch_size=12",
        ),
        ({"model": {"num_attention_heads": 3}}, 1, "model.num_attention_heads=3 does not divide"),
        ({"model": {"hidden_size": 12, "num_attention_heads": 4}}, 1, "odd head width"),
        ({"model": {"num_query_groups": 3}}, 1, "model.num_query_groups=3 does not divide"),
        ({"model": {"head_dim": 7}}, 1, "model.head_dim=7 is odd"),
        ({"model": {"head_dim": 6, "num_attention_heads": 3, "num_query_groups": 2}}, 1, "num_query_groups=2 does not"),
        ({"moe": {"dense_layers": [4]}}, 1, "moe.dense_layers=[4] must name layers from 0 to 3"),
        ({"moe": {"dense_layers": [1, 0]}}, 1, "in ascending order"),
        ({"moe": {"dense_layers": [1, 3], "layer_frequency": 2}}, 1, "moe.dense_layers=[1, 3] leaves no MoE layer"),
        ({"moe": {"shared_expert_gate": True}}, 1, "moe.shared_expert_gate=true needs a shared expert"),
        (
            {"moe": {"null_types": {"identity": 2}, "router": {"normalize": "all_true"}}},
            1,
            "moe.router.normalize=all_true gives null experts no share",
        ),
        (
            {"moe": {"router": {"normalize": "all_true", "score_function": "sigmoid"}}},
            1,
            "use normalize=none",
        ),
        ({"moe": {"layer_frequency": 5}}, 1, "moe.layer_frequency=5 leaves no MoE layer"),
        ({"moe": {"router": {"type": "topk"}}}, 1, "moe.num_null_experts=8 needs moe.router.type=adamoe"),
        (
            {"moe": {"num_null_experts": 0, "router": {"type": "topk"}}},
            1,
            "moe.router.balance.type=null_averaged is AdaMoE's loss",
        ),
        (
            {
                "moe": {
                    "num_null_experts": 0,
                    "router": {"type": "topk", "normalize": "all_selected", "balance": {"type": "none"}},
                }
            },
            1,
            "moe.router.normalize=all_selected",
        ),
        ({"moe": {"router": {"balance": {"anneal_steps": 5}}}}, 1, "moe.router.balance.anneal_steps=5 does nothing"),
        (
            {"moe": {"router": {"balance": {"type": "none", "final_coefficient": 0.1}}}},
            1,
            "moe.router.balance.final_coefficient=0.1 does nothing",
        ),
        (
            {"moe": {"null_types": {"identity": 5, "constant": 4}}},
            1,
            "moe.null_types.identity=5 + moe.null_types.constant=4 are more than moe.num_null_experts=8",
        ),
        (
            {"moe": {"null_types": {"identity": 1}, "router": {"type": "topk"}}},
            1,
            "moe.null_types.identity=1, moe.null_types.constant=0 need moe.router.type=adamoe",
        ),
        (
            {"moe": {"null_types": {"identity": 1}, "router": {"null_init": "shared"}}},
            1,
            "moe.router.null_init=shared gives all null experts one score",
        ),
        (topk_with(score_function="sigmoid"), 1, "moe.router.score_function=sigmoid needs moe.router.type=adamoe"),
        (topk_with(capacity_factor=1.5), 1, "moe.router.capacity_factor=1.5 needs moe.router.type=adamoe"),
        (topk_with(gating_residual=True), 1, "moe.router.gating_residual=True needs moe.router.type=adamoe"),
        (
            topk_with(balance={"type": "switch", "scope": "global_batch"}),
            1,
            "moe.router.balance.scope=global_batch needs moe.router.type=adamoe",
        ),
        (topk_with(balance={"type": "grouped"}), 1, "moe.router.balance.type=grouped is AdaMoE's loss"),
        (
            {"moe": {"router": {"drop_policy": "position"}}},
            1,
            "moe.router.drop_policy=position does nothing without moe.router.capacity_factor",
        ),
        (
            {"moe": {"router": {"gating_residual": True}}, "parallel": {"pipeline": 2}},
            2,
            "parallel.pipeline=2 would have to send from stage to stage",
        ),
        (
            {"moe": {"router": {"balance": {"type": "none", "scope": "global_batch"}}}},
            1,
            "moe.router.balance.scope=global_batch does nothing with moe.router.balance.type=none",
        ),
        (
            {"moe": {"num_null_experts": 0, "router": {"balance": {"type": "grouped"}}}},
            1,
            "moe.router.balance.type=grouped balances true against null experts and moe.num_null_experts=0 has none",
        ),
        (
            {"moe": {"router": {"balance": {"target_null_share": 0.5}}}},
            1,
            "moe.router.balance.target_null_share=0.5 does nothing with moe.router.balance.type=null_averaged",
        ),
        (
            {"moe": {"num_null_experts": 1, "router": {"balance": {"type": "grouped", "target_null_share": 0.5}}}},
            1,
            "moe.router.balance.target_null_share=0.5 of moe.top_k=3 slots cannot be reached",
        ),
        ({"moe": {"dispatcher": {"flex_backend": "hybridep"}}}, 1, "moe.dispatcher.flex_backend=hybridep does nothing"),
        (
            {"moe": {"dispatcher": {"type": "allgather", "deduplicate": False}}},
            1,
            "moe.dispatcher.deduplicate=false is for type=alltoall",
        ),
        (
            {"moe": {"dispatcher": {"type": "allgather", "dtype": "bf16"}}},
            1,
            "moe.dispatcher.dtype=bf16 would round the sums",
        ),
        (
            {"moe": {"dispatcher": {"pad_to_capacity": True}}},
            1,
            "moe.dispatcher.pad_to_capacity=true needs moe.router.capacity_factor",
        ),
        ({"moe": {**TOPK, "dispatcher": {"type": "allgather"}}}, 1, "moe.dispatcher.type=allgather needs moe.router"),
        ({"moe": {**TOPK, "dispatcher": {"dtype": "bf16"}}}, 1, "moe.dispatcher.dtype=bf16 needs moe.router.type"),
        ({"moe": {"router": {"bias_rate": 0.7}}}, 1, "moe.router.bias_rate=0.7 does nothing without"),
        ({"moe": {"router": {"bias_decay_steps": 5}}}, 1, "moe.router.bias_decay_steps=5 does nothing without"),
        (
            {
                "moe": {
                    "num_null_experts": 0,
                    "router": {"type": "topk", "target_load": 1.2, "balance": {"type": "none"}},
                }
            },
            1,
            "moe.router.target_load=1.2 needs moe.router.type=adamoe",
        ),
        (
            {"moe": {"num_null_experts": 0, "router": {"target_load": 1.2}}},
            1,
            "moe.router.target_load=1.2 needs null experts",
        ),
        (
            {"moe": {"router": {"target_load": 3.0}}},
            1,
            "moe.router.target_load=3 is not between 0 and 3 (both excluded), the loads that moe.top_k=3, "
            "moe.num_experts=8 and moe.num_null_experts=8 can give; change it, or raise moe.top_k",
        ),
        (
            {"moe": {"top_k": 6, "num_null_experts": 2, "router": {"target_load": 4.0}}},
            1,
            "is not between 4 and 6 (both excluded), the loads that moe.top_k=6, moe.num_experts=8 and "
            "moe.num_null_experts=2 can give; change it, or lower moe.top_k or raise moe.num_null_experts",
        ),
        (
            {"moe": {"top_k": 9, "router": {"target_load": 8.5}}},
            1,
            "is not between 1 and 8 (both excluded), the loads that moe.top_k=9, moe.num_experts=8 and "
            "moe.num_null_experts=8 can give; change it, or raise moe.num_experts",
        ),
        ({"data": {"train": []}}, 1, "data.train is empty"),
        ({"data": {"tokenizer": ""}}, 1, "data.tokenizer is empty"),
        ({"data": {"train": [{"weight": 1}]}}, 1, "needs a path"),
        ({"data": {"train": [{"path": "p", "weight": -1}]}}, 1, "it must be a positive number"),
        ({"data": {"train": [{"path": "p", "wieght": 1}]}}, 1, "has the unknown key wieght"),
        ({"data": {"prepare": {"input": ["x"]}}}, 1, "data.prepare.input=['x'] makes one training set PREFIX_train"),
        (
            {
                "data": {
                    "train": [{"path": "a_train"}],
                    "validation": [{"path": "a_validation"}],
                    "prepare": {"input": ["x"], "validation_fraction": 0.0},
                }
            },
            1,
            "data.prepare.validation_fraction=0 makes no a_validation",
        ),
        ({"schedule": {"total_steps": 5}}, 1, "schedule.total_steps=5 is less than train.steps=100"),
        ({"optimizer": {"type": "sgd", "implementation": "apex"}}, 1, "optimizer.implementation=apex is for"),
        ({"checkpoint": {"load_weights": "x", "resume": "y"}}, 1, "checkpoint.load_weights=x starts a new run"),
        ({"zero": {"deepspeed": {"gradient_clipping": 2}}}, 1, "is set by train.gradient_clipping"),
        ({"zero": {"deepspeed": {"csv_monitor": {"enabled": True}}}}, 1, "is set by monitor.csv"),
        ({"monitor": {"sample_interval": 5}}, 1, "monitor.sample_interval=5 does nothing with monitor.sample_tokens=0"),
        ({"monitor": {"wandb": {"team": "t"}}}, 1, "monitor.wandb.team=t does nothing without monitor.wandb.project"),
        ({"monitor": {"wandb": {"project": ""}}}, 1, "monitor.wandb.project is empty"),
        ({"zero": {"deepspeed": {"communication_data_type": "bf16"}}}, 1, "is set by train.precision"),
        (
            {"run": {"deterministic": True}, "moe": {"dispatcher": {"type": "flex"}}},
            1,
            "moe.dispatcher.type=flex adds rows in an order that its kernels do not promise",
        ),
        ({"zero": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, 1, "is set by zero.stage"),
    ],
)
def test_refusals(changes: dict, world_size: int, expected: str) -> None:
    assert expected in refusal(tree(**changes), world_size)


def test_a_target_load_is_the_expected_load() -> None:
    assert tree().moe.expected_load == 1.5
    held = tree(moe={"router": {"target_load": 1.2, "balance": {"type": "none"}}})
    resolve(held, 1)
    assert held.moe.expected_load == 1.2
    resolve(tree(moe={"top_k": 6, "num_null_experts": 2, "router": {"target_load": 4.001}}), 1)


def test_problems_of_several_sections_come_together() -> None:
    message = refusal(tree(moe={"top_k": 99}, train={"global_batch_size": 7}, model={"num_attention_heads": 5}), 2)
    assert message.startswith("3 problems:")


def test_fixed_shapes_are_for_the_all_to_all() -> None:
    message = refusal(tree(moe={"dispatcher": {"type": "allgather", "pad_to_capacity": True}}))
    assert "moe.dispatcher.pad_to_capacity=true needs type=alltoall, not allgather" in message
    message = refusal(tree(moe={**TOPK, "dispatcher": {"pad_to_capacity": True}}))
    assert "moe.dispatcher.pad_to_capacity=true needs moe.router.type=adamoe" in message


def test_reference_top_k_defaults() -> None:
    assert tree(moe={"num_null_experts": 0, "top_k": 4}).reference_top_k == 4
    assert tree(moe={"top_k": 4}).reference_top_k == 2
    assert tree(moe={"reference_top_k": 3}).reference_top_k == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"zero": {"stage": 0, "offload_optimizer": True}}, "zero.offload_optimizer=True needs a sharded optimizer"),
        (
            {"zero": {"offload_optimizer": True}, "optimizer": {"implementation": "apex"}},
            "optimizer.implementation=apex updates on CUDA",
        ),
        ({"optimizer": {"implementation": "deepspeed_cpu"}}, "deepspeed_cpu is for an offloaded optimizer"),
        (
            {"zero": {"offload_optimizer": True}, "optimizer": {"type": "sgd", "implementation": "deepspeed_cpu"}},
            "optimizer.implementation=deepspeed_cpu is for optimizer.type=adamw",
        ),
        ({"zero": {"deepspeed": {"zero_optimization": {"offload_optimizer": {}}}}}, "is set by zero.offload_optimizer"),
        (
            {"moe": {"router": {"gating_residual": True}}, "train": {"recompute": "full"}},
            "which train.recompute=full would run out of turn",
        ),
    ],
)
def test_options_of_the_optimizer_and_of_recompute_that_exclude_each_other(changes: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        resolve(config_from_dict({"data": {"tokenizer": "t", "train": [{"path": "p"}]}, **changes}), 2)
