"""A checkpoint of another run is refused with every reason at once."""

import copy
from typing import Any

import pytest

from adamoe_dist.checkpoint import check_compatible, notes_on_cut
from adamoe_dist.checkpoint.manifest import STATE, write_json
from adamoe_dist.config import config_from_dict, resolve
from adamoe_dist.errors import UserError
from tests.checkpoint.conftest import Make


def test_same_run(make: Make, tree: dict[str, Any]) -> None:
    check_compatible(make(1), tree, "abc")
    check_compatible(make(2), tree, None)


def test_what_may_change(make: Make, tree: dict[str, Any]) -> None:
    """How a run is cut and computed, how far it goes, where it is and what it reports."""
    tree["run"].update(name="other", dir="elsewhere", deterministic=True)
    tree["parallel"].update(expert=2, tensor=2)
    tree["zero"].update(stage=2, deepspeed={"zero_optimization": {"sub_group_size": 9}})
    tree["train"].update(precision="bf16", recompute="full", micro_batch_size=1, validation_interval=7)
    tree["schedule"]["total_steps"], tree["train"]["steps"] = tree["train"]["steps"], 1000
    tree["optimizer"]["implementation"] = "torch"
    tree["moe"]["dispatcher"].update(type="allgather", deduplicate=False)
    tree["moe"]["experts"]["kernel"] = "sequential"
    tree["data"].update(tokenizer="moved", train=[{"path": "moved"}])
    assert check_compatible(make(1), tree, "abc") == []


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "hidden_size", 256, "model.hidden_size is 128 there, 256 here"),
        ("model", "num_query_groups", 2, "model.num_query_groups is None there, 2 here"),
        ("moe", "num_null_experts", 4, "moe.num_null_experts is 8 there, 4 here"),
        ("moe", "top_k", 2, "moe.top_k is 3 there, 2 here"),
        ("run", "seed", 5, "run.seed is 1234 there, 5 here"),
        ("optimizer", "type", "sgd", "optimizer.type is adamw there, sgd here"),
    ],
)
def test_one_difference(make: Make, tree: dict[str, Any], section: str, key: str, value: Any, message: str) -> None:
    path = make(1)
    tree[section][key] = value
    with pytest.raises(UserError) as caught:
        check_compatible(path, tree, "abc")
    assert str(caught.value) == (
        f"checkpoint {path} is of another run: {message}; set them as there, or start a new run in another run.dir"
    )


def test_router_options_that_change_weights_or_their_meaning(make: Make, tree: dict[str, Any]) -> None:
    path = make(1)
    tree["moe"]["null_types"]["constant"] = 2
    tree["moe"]["router"]["score_function"] = "sigmoid"
    tree["moe"]["router"]["gating_residual"] = True
    with pytest.raises(UserError) as caught:
        check_compatible(path, tree, "abc", weights_only=True)
    for part in (
        "moe.null_types.constant is 0 there, 2 here",
        "moe.router.score_function is softmax there, sigmoid here",
        "moe.router.gating_residual is False there, True here",
    ):
        assert part in str(caught.value)


def test_all_differences_are_listed(make: Make, tree: dict[str, Any]) -> None:
    path = make(1)
    changed = copy.deepcopy(tree)
    changed["model"]["num_layers"] = 9
    changed["model"]["new_key"] = True
    del changed["model"]["init_std"]
    changed["moe"]["router"]["null_init"] = "shared"
    with pytest.raises(UserError) as caught:
        check_compatible(path, changed, "def")
    for part in (
        "model.num_layers is 4 there, 9 here",
        "model.new_key is absent there, True here",
        "model.init_std is 0.02 there, absent here",
        "moe.router.null_init is random there, shared here",
        "the tokenizer's fingerprint is abc there, def here",
    ):
        assert str(caught.value).count(part) == 1
    assert "\n" not in str(caught.value)


def test_weights_only(make: Make, tree: dict[str, Any]) -> None:
    path = make(1)
    tree["run"]["seed"] = 5
    tree["optimizer"]["type"] = "sgd"
    tree["model"]["sequence_length"] = 64
    check_compatible(path, tree, "abc", weights_only=True)
    tree["model"]["num_layers"] = 9
    with pytest.raises(UserError, match=r"model\.num_layers is 4 there, 9 here; set them as there$"):
        check_compatible(path, tree, "abc", weights_only=True)


def test_adapters_are_taken_as_they_are_or_merged(make: Make, tree: dict[str, Any]) -> None:
    lora = tree["finetune"]["lora"]
    plain = make(1)
    lora.update(rank=8, alpha=4.0)
    assert check_compatible(plain, tree, "abc", weights_only=True) == []
    adapted = make(2)
    assert check_compatible(adapted, tree, "abc", weights_only=True) == []
    for key, value in (("alpha", 64.0), ("rank", 4), ("targets", ["attention"])):
        changed = copy.deepcopy(tree)
        changed["finetune"]["lora"][key] = value
        with pytest.raises(UserError, match=rf"finetune\.lora\.{key} is .* here; set them as there, or .*rank=null"):
            check_compatible(adapted, changed, "abc", weights_only=True)
    lora.update(rank=None, alpha=64.0)
    (note,) = check_compatible(adapted, tree, "abc", weights_only=True)
    assert "adapters of rank 8" in note and str(adapted) in note


def test_weights_of_megatrons_router_may_be_taken_by_adamoes(make: Make, tree: dict[str, Any]) -> None:
    tree["moe"].update(num_null_experts=0, top_k=2)
    adamoe = make(1)
    tree["moe"]["router"]["type"] = "topk"
    topk = make(2)
    with pytest.raises(UserError, match=r"moe\.router\.type is adamoe there, topk here"):
        check_compatible(adamoe, tree, "abc", weights_only=True)
    tree["moe"]["router"]["type"] = "adamoe"
    assert check_compatible(topk, tree, "abc", weights_only=True) == []
    with pytest.raises(UserError, match=r"moe\.router\.type is topk there, adamoe here"):
        check_compatible(topk, tree, "abc")
    tree["moe"]["num_null_experts"] = 4
    with pytest.raises(UserError, match=r"moe\.num_null_experts is 0 there, 4 here"):
        check_compatible(topk, tree, "abc", weights_only=True)


def test_a_target_load_is_fixed_on_resume_and_may_come_or_change_but_not_go_with_weights(
    make: Make, tree: dict[str, Any]
) -> None:
    router = tree["moe"]["router"]
    free = make(1)
    router["target_load"] = 1.2
    held = make(2)
    check_compatible(held, tree, "abc")
    check_compatible(free, tree, "abc", weights_only=True)
    with pytest.raises(UserError, match=r"moe\.router\.target_load is None there, 1\.2 here"):
        check_compatible(free, tree, "abc")
    router["target_load"] = 1.8
    check_compatible(held, tree, "abc", weights_only=True)
    with pytest.raises(UserError, match=r"moe\.router\.target_load is 1\.2 there, 1\.8 here"):
        check_compatible(held, tree, "abc")
    router["target_load"] = None
    with pytest.raises(UserError, match=r"moe\.router\.target_load is 1\.2 there, None here; set them as there$"):
        check_compatible(held, tree, "abc", weights_only=True)


def test_a_checkpoint_older_than_a_key_is_one_with_the_key_off(make: Make, tree: dict[str, Any]) -> None:
    del tree["moe"]["router"]["target_load"]
    path = make(1)
    tree["moe"]["router"]["target_load"] = None
    check_compatible(path, tree, "abc")


def nested(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    inner = {name: merged(base[name], value) for name, value in changes.items() if isinstance(value, dict)}
    return base | changes | inner


CHANGES = [
    ("optimizer.learning_rate", 5e-4, "0.0003 -> 0.0005"),
    ("optimizer.beta1", 0.8, "0.9 -> 0.8"),
    ("optimizer.beta2", 0.99, "0.95 -> 0.99"),
    ("optimizer.epsilon", 1e-6, "1e-08 -> 1e-06"),
    ("optimizer.weight_decay", 0.0, "0.1 -> 0.0"),
    ("schedule.total_steps", 200, "100 -> 200"),
    ("schedule.warmup_steps", 5, "0 -> 5"),
    ("schedule.decay", "linear", "cosine -> linear"),
    ("schedule.final_fraction", 0.0, "0.1 -> 0.0"),
    ("train.global_batch_size", 8, "16 -> 8"),
    ("train.gradient_clipping", 0.5, "1.0 -> 0.5"),
    ("moe.router.balance.type", "switch", "null_averaged -> switch"),
    ("moe.router.balance.coefficient", 0.5, "0.02 -> 0.5"),
    ("moe.router.balance.final_coefficient", 0.5, "None -> 0.5"),
    ("moe.router.balance.anneal_steps", 5, "None -> 5"),
    ("moe.router.balance.target_null_share", 0.5, "None -> 0.5"),
    ("moe.router.balance.scope", "global_batch", "micro_batch -> global_batch"),
    ("moe.router.z_loss_coefficient", 1e-3, "0.0 -> 0.001"),
    ("moe.router.capacity_factor", 2.0, "None -> 2.0"),
    ("moe.router.drop_policy", "position", "probs -> position"),
    ("moe.router.bias_rate", 0.1, "0.5 -> 0.1"),
    ("moe.router.bias_decay_steps", 9, "None -> 9"),
    ("moe.dispatcher.dtype", "bf16", "model -> bf16"),
    ("moe.dispatcher.pad_to_capacity", True, "False -> True"),
]


@pytest.mark.parametrize(("key", "value", "change"), CHANGES)
def test_what_changes_the_numbers_is_refused_unless_named(
    make: Make, tree: dict[str, Any], key: str, value: Any, change: str
) -> None:
    path, there = make(1), change.split(" -> ")[0]
    changed = merged(tree, nested(key, value))
    with pytest.raises(UserError) as caught:
        check_compatible(path, changed, "abc")
    message = str(caught.value)
    assert key in message and f" is {there} there, {value} here; " in message
    assert message.endswith(f"or change them knowingly with checkpoint.allow_changes=[{key}]")
    for allowed in (key, key.rpartition(".")[0], key.split(".")[0]):
        changed["checkpoint"] = {**changed["checkpoint"], "allow_changes": ["data", allowed]}
        assert check_compatible(path, changed, "abc") == [f"checkpoint.allow_changes: {key} {change}"]
    assert check_compatible(path, merged(tree, nested(key, value)), "abc", weights_only=True) == []


def test_the_name_of_one_key_allows_no_other(make: Make, tree: dict[str, Any]) -> None:
    path = make(1)
    tree["optimizer"].update(learning_rate=1.0, beta1=0.5, type="sgd")
    tree["checkpoint"]["allow_changes"] = ["optimizer.learning_rate"]
    with pytest.raises(UserError) as caught:
        check_compatible(path, tree, "abc")
    message = str(caught.value)
    assert "optimizer.learning_rate" not in message
    assert "optimizer.type is adamw there, sgd here" in message and "optimizer.beta1 is 0.9 there, 0.5 here" in message
    assert message.endswith("of these checkpoint.allow_changes can allow optimizer.beta1")
    tree["checkpoint"]["allow_changes"] = ["optimizer"]
    with pytest.raises(
        UserError, match=r"of another run: optimizer\.type is adamw there, sgd here; set them as there, or"
    ):
        check_compatible(path, tree, "abc")


def test_more_steps_stretch_the_schedule_unless_its_length_is_given(make: Make, tree: dict[str, Any]) -> None:
    path = make(1)
    tree["train"]["steps"] = 150
    with pytest.raises(
        UserError, match=r"schedule\.total_steps \(where null, train\.steps; .*\) is 100 there, 150 here"
    ):
        check_compatible(path, tree, None)
    tree["schedule"]["total_steps"] = 100
    assert check_compatible(path, tree, None) == []
    tree["schedule"].update(decay="constant")
    constant = make(2)
    tree["schedule"]["total_steps"] = None
    assert check_compatible(constant, tree, None) == []
    for changes in (
        {"balance": {"final_coefficient": 0.1}},
        {"target_load": 1.2, "balance": {"type": "none", "final_coefficient": 0.1}},
    ):
        annealed = merged(tree, {"moe": {"router": changes}})
        path = make_of(make, tree, annealed)
        annealed["train"]["steps"] += 1
        with pytest.raises(UserError, match=r"trained otherwise: schedule\.total_steps"):
            check_compatible(path, annealed, None)
        tree["train"]["steps"] += 1


def make_of(make: Make, fixture: dict[str, Any], tree: dict[str, Any]) -> Any:
    """A checkpoint of a run with another tree than the fixture's, which stays as it is."""
    before = copy.deepcopy(fixture)
    fixture.update(copy.deepcopy(tree))
    path = make(fixture["train"]["steps"])
    fixture.clear()
    fixture.update(before)
    return path


def test_a_named_target_load_may_move_but_not_come_or_go(make: Make, tree: dict[str, Any]) -> None:
    router = tree["moe"]["router"]
    tree["checkpoint"]["allow_changes"] = ["moe.router"]
    router["target_load"] = 1.2
    held = make(1)
    router["target_load"] = 1.8
    assert check_compatible(held, tree, "abc") == ["checkpoint.allow_changes: moe.router.target_load 1.2 -> 1.8"]
    router["target_load"] = None
    with pytest.raises(UserError, match=r"of another run: moe\.router\.target_load is 1\.2 there, None here"):
        check_compatible(held, tree, "abc")


def test_a_checkpoint_older_than_a_key_has_its_default(make: Make, tree: dict[str, Any]) -> None:
    now = copy.deepcopy(tree)
    del tree["moe"]["router"]["z_loss_coefficient"], tree["moe"]["router"]["score_function"], tree["schedule"]
    path = make(1)
    assert check_compatible(path, now, "abc") == []
    now["moe"]["router"].update(z_loss_coefficient=0.1, score_function="sigmoid")
    with pytest.raises(UserError) as caught:
        check_compatible(path, now, "abc")
    assert "moe.router.z_loss_coefficient is 0.0 there, 0.1 here" in str(caught.value)
    assert "moe.router.score_function is softmax there, sigmoid here" in str(caught.value)


def test_a_key_of_a_later_version_is_not_passed_over(make: Make, tree: dict[str, Any]) -> None:
    now = copy.deepcopy(tree)
    tree["moe"]["router"]["telepathy"] = 3
    tree["moe"]["unused"] = None
    with pytest.raises(UserError, match=r"of another run: moe\.router\.telepathy is 3 there, absent here; set them"):
        check_compatible(make(1), now, "abc")


def identity(*parts: tuple[str, str, str]) -> dict[str, Any]:
    datasets = [
        {"prefix": prefix, "fingerprint": content, "seed": 1, "weight": share} for prefix, content, share in parts
    ]
    return {"seed": 1, "sequence_length": 128, "datasets": datasets}


def test_training_samples_are_compared_by_content_and_share(make: Make, tree: dict[str, Any]) -> None:
    path = make(1)
    before = identity(("a/one", "0123456789abcdef", "2/3"), ("a/two", "fedcba9876543210", "1/3"))
    write_json(path / STATE, {"tokenizer_fingerprint": "abc", "data": {"consumed_samples": 5, **before}})
    moved = identity(("b/uno", "0123456789abcdef", "2/3"), ("b/due", "fedcba9876543210", "1/3"))
    assert check_compatible(path, tree, "abc", samples=moved) == []
    shifted = identity(("b/uno", "0123456789abcdef", "1/2"), ("b/due", "fedcba9876543210", "1/2"))
    sets = (
        "[one 0123456789ab x 2/3, two fedcba987654 x 1/3]",
        "[uno 0123456789ab x 1/2, due fedcba987654 x 1/2]",
    )
    with pytest.raises(UserError) as caught:
        check_compatible(path, tree, "abc", samples=shifted)
    assert f"data.train is {sets[0]} there, {sets[1]} here; set them as there, or change" in str(caught.value)
    assert check_compatible(path, tree, "abc", weights_only=True, samples=shifted) == []
    tree["checkpoint"]["allow_changes"] = ["data.train"]
    note = f"checkpoint.allow_changes: data.train {sets[0]} -> {sets[1]}"
    assert check_compatible(path, tree, "abc", samples=shifted) == [note]


@pytest.mark.parametrize(
    ("router", "cut", "world", "expected"),
    [
        ({}, {}, 1, []),
        ({}, {"train": {"micro_batch_size": 2}}, 2, ["counts loads over 2 samples at a time here, 4 in"]),
        ({"balance": {"type": "none"}}, {"train": {"micro_batch_size": 2}}, 2, []),
        ({}, {}, 2, []),
        ({"balance": {"scope": "global_batch"}}, {}, 2, ["counts loads over 8 samples at a time here, 4 in"]),
        ({"balance": {"scope": "global_batch"}}, {"train": {"micro_batch_size": 2}}, 2, []),
        ({"capacity_factor": 1.5}, {"parallel": {"tensor": 2}}, 2, ["of 4 samples on 2 ranks here, of 4 on 1 in"]),
        ({}, {"parallel": {"tensor": 2}}, 2, []),
        ({}, {"train": {"micro_batch_size": "auto"}}, 2, ["counts loads over 8 samples at a time here, 4 in"]),
    ],
)
def test_where_the_cut_changes_the_numbers_is_noted(
    make: Make, tree: dict[str, Any], router: dict[str, Any], cut: dict[str, Any], world: int, expected: list[str]
) -> None:
    tree.update(merged(tree, {"train": {"micro_batch_size": 4}, "moe": {"router": router}}))
    path = make(1)
    now = merged(tree, cut)
    notes = notes_on_cut(path, now, resolve(config_from_dict(now), world))
    assert len(notes) == len(expected) and all(part in note for part, note in zip(expected, notes, strict=True)), notes
