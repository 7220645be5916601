"""A checkpoint of another run is refused with every reason at once."""

import copy
from typing import Any

import pytest

from adamoe_dist.checkpoint import check_compatible
from adamoe_dist.errors import UserError
from tests.checkpoint.conftest import Make


def test_same_run(make: Make, tree: dict[str, Any]) -> None:
    check_compatible(make(1), tree, "abc")
    check_compatible(make(2), tree, None)


def test_what_may_change(make: Make, tree: dict[str, Any]) -> None:
    tree["parallel"]["expert"] = 2
    tree["zero"]["stage"] = 2
    tree["train"]["precision"] = "bf16"
    tree["optimizer"]["learning_rate"] = 1.0
    tree["moe"]["router"]["balance"]["coefficient"] = 0.5
    tree["moe"]["dispatcher"]["deduplicate"] = False
    check_compatible(make(1), tree, "abc")


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
