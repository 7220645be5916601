"""Another number of null experts: the rest keeps its bits, and what cannot be made is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adamoe_dist.checkpoint import (
    changed_keys,
    check_compatible,
    find_checkpoint,
    plan_null_experts,
    read_config,
    read_manifest,
    read_state,
    set_null_experts,
    verify_files,
)
from adamoe_dist.checkpoint.index import read_index, read_tensor
from adamoe_dist.errors import UserError
from tests.checkpoint.small import EXPERTS, HIDDEN, LAYERS, make_checkpoint, tree_of, weights_of

ROWS = [f"decoder.layers.{layer}.mlp.router.null_weight" for layer in range(LAYERS)]
CONSTANTS = [f"decoder.layers.{layer}.mlp.null_experts.constant" for layer in range(LAYERS)]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    index = read_index(path)
    return {key: read_tensor(path, index, key) for key in index}


def changed(source: Path, to: Path, num_null: int, top_k: int, *arguments: Any) -> Path:
    path = set_null_experts(source, to, plan_null_experts(source, num_null, top_k, *arguments))
    verify_files(path)
    return path


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def moe(**changes: Any) -> dict[str, Any]:
    return {"moe": changes}


def test_to_null_experts_and_back(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "run" / "checkpoints")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    path = changed(source, tmp_path / "more", 6, 3)
    assert path == tmp_path / "more" / "iter_0000003" == find_checkpoint(str(tmp_path / "more"), tmp_path)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
    ]
    kept = {name: (path / name).read_bytes() for name in before if ".distcp" in name or name == "state.json"}
    assert kept == {name: before[name] for name in kept}

    tensors = tensors_of(path)
    new = {f"{kind}.{name}" for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq") for name in ROWS}
    assert_same({key: value for key, value in tensors.items() if key not in new}, weights_of(tree_of({})))
    assert new <= tensors.keys()
    for key in new:
        assert tensors[key].shape == (6, HIDDEN) and tensors[key].dtype == torch.float32
        assert key.startswith("model.") or not tensors[key].any()

    tree = tree_of(moe(num_null_experts=6, top_k=3, router={"null_init": "copy"}))
    assert read_config(path) == tree
    check_compatible(path, tree, "abc")
    assert read_state(path) == read_state(source)
    assert read_manifest(path)["step"] == 3 and read_manifest(path)["layout"] == {"world_size": 1}

    back = changed(path, tmp_path / "back", 0, 2)
    assert_same(tensors_of(back), weights_of(tree_of({})))
    assert read_config(back) == tree_of({})
    assert not (back / "__null_experts.distcp").exists()


def test_copies_are_of_the_true_rows_and_random_rows_as_large_as_a_new_models(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    copied = tensors_of(changed(source, tmp_path / "copy", 6, 3, "copy"))
    drawn = tensors_of(changed(source, tmp_path / "random", 500, 3, "random"))
    for name in ROWS:
        true = copied["model." + name.replace("null_weight", "weight")].double()
        rows = copied[f"model.{name}"].double()
        ratio = (rows - true[torch.arange(6) % EXPERTS]).norm() / (6 * HIDDEN) ** 0.5 / true.std(correction=0)
        assert 0.005 < ratio < 0.02
        assert drawn[f"model.{name}"].std() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(drawn[f"model.{ROWS[0]}"], drawn[f"model.{ROWS[1]}"])


def test_seed_decides(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    first, again, other = (
        tensors_of(changed(source, tmp_path / name, 4, 2, "copy", seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert_same(first, again)
    assert not torch.equal(first[f"model.{ROWS[0]}"], other[f"model.{ROWS[0]}"])


def test_rows_are_kept_or_drawn(tmp_path: Path) -> None:
    """As many: kept, unless asked; another number: as the model's were drawn."""
    source = make_checkpoint(tmp_path / "source", moe(num_null_experts=4, top_k=3))
    before = tensors_of(source)
    path = changed(source, tmp_path / "k", 4, 2)
    assert_same(tensors_of(path), before)
    assert changed_keys(source, plan_null_experts(source, 4, 2)) == {"moe.top_k": 2}
    for number, arguments in enumerate([(4, 3, "random"), (3, 3)]):
        path = changed(source, tmp_path / f"new{number}", *arguments)
        after = tensors_of(path)
        assert read_config(path)["moe"]["router"]["null_init"] == "random"
        for name in ROWS:
            assert after[f"model.{name}"].shape == (arguments[0], HIDDEN)
            assert not torch.isin(after[f"model.{name}"], before[f"model.{name}"]).any()
            assert not after[f"optimizer.exp_avg.{name}"].any()


def test_shared_row_serves_any_number(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "one", moe(num_null_experts=4, router={"null_init": "shared"}))
    path = changed(source, tmp_path / "more", 9, 5)
    assert_same(tensors_of(path), tensors_of(source))
    assert changed_keys(source, plan_null_experts(source, 9, 5)) == {"moe.num_null_experts": 9, "moe.top_k": 5}
    own = tensors_of(changed(path, tmp_path / "own", 9, 5, "copy"))
    assert own[f"model.{ROWS[0]}"].shape == (9, HIDDEN)
    assert tensors_of(changed(make_checkpoint(tmp_path / "none"), tmp_path / "shared", 4, 2, "shared"))[
        f"model.{ROWS[0]}"
    ].shape == (1, HIDDEN)


def test_without_moments(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", {"optimizer": {"type": "sgd"}})
    new = tensors_of(changed(source, tmp_path / "more", 4, 3)).keys() - tensors_of(source).keys()
    assert new == {f"model.{name}" for name in ROWS}


def test_null_experts_with_an_output(tmp_path: Path) -> None:
    """Their vectors do not depend on m: they stay, and go with the last null expert."""
    types = {"identity": 1, "constant": 2}
    source = make_checkpoint(tmp_path / "source", moe(num_null_experts=4, null_types=types))
    before, after = tensors_of(source), tensors_of(changed(source, tmp_path / "more", 6, 2))
    for name in CONSTANTS:
        assert torch.equal(before[f"model.{name}"], after[f"model.{name}"])
    assert read_config(tmp_path / "more" / "iter_0000003")["moe"]["null_types"] == types
    none = changed(source, tmp_path / "none", 0, 2)
    assert not any("null" in key for key in tensors_of(none))
    assert read_config(none)["moe"]["null_types"] == {"identity": 0, "constant": 0}
    with pytest.raises(UserError, match=r"--num-null-experts 2 --top-k 2 do not fit .*moe\.null_types\.identity=1 \+ "):
        plan_null_experts(source, 2, 2)


@pytest.mark.parametrize(
    ("rule", "scores", "more", "none"),
    [
        ("none", "softmax", "all_true", "none"),
        ("none", "sigmoid", "none", "none"),
        ("true_experts", "softmax", "true_experts", "true_experts"),
    ],
)
def test_weights_stay_what_they_are(tmp_path: Path, rule: str, scores: str, more: str, none: str) -> None:
    """Where a model of plain scores gets its first null experts, and where they all go."""
    router = {"normalize": rule, "score_function": scores, "balance": {"type": "switch"}}
    source = make_checkpoint(tmp_path / "source", moe(router=router))
    path = changed(source, tmp_path / "more", 4, 3)
    assert read_config(path)["moe"]["router"]["normalize"] == more
    keys = changed_keys(source, plan_null_experts(source, 4, 3))
    assert keys.get("moe.router.normalize", rule) == more
    assert read_config(changed(path, tmp_path / "back", 0, 2))["moe"]["router"]["normalize"] == none
    assert changed_keys(path, plan_null_experts(path, 5, 3)).keys() == {"moe.num_null_experts"}


def test_megatrons_router_becomes_adamoes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path, moe(router={"type": "topk", "balance": {"type": "switch"}}))
    assert changed_keys(source, plan_null_experts(source, 4, 3)) == {
        "moe.num_null_experts": 4,
        "moe.top_k": 3,
        "moe.router.type": "adamoe",
        "moe.router.null_init": "copy",
    }
    assert changed_keys(source, plan_null_experts(source, 0, 3)) == {"moe.top_k": 3}


@pytest.mark.parametrize(
    ("changes", "num_null", "top_k", "message"),
    [
        ({}, 3, 8, r"moe\.top_k=8 is more than the 7 experts there are"),
        ({}, 0, 5, r"moe\.top_k=5 is more than the 4 experts there are"),
        ({}, -1, 2, r"moe\.num_null_experts=-1 must be at least 0"),
        ({}, 4, 0, r"moe\.top_k=0 must be at least 1"),
        (
            {"num_null_experts": 4, "router": {"gating_residual": True}},
            6,
            2,
            r"moe\.router\.gating_residual=true, whose learned weights are for 4 null experts and cannot be made for 6",
        ),
        (
            {"num_null_experts": 4, "router": {"target_load": 1.0}},
            0,
            2,
            r"moe\.router\.target_load=1, whose selection bias .* give at least 1",
        ),
        ({"num_null_experts": 4, "router": {"target_load": 1.0}}, 1, 2, r"target_load=1 is not between 1 and 2"),
    ],
)
def test_refused_numbers(tmp_path: Path, changes: dict[str, Any], num_null: int, top_k: int, message: str) -> None:
    source = make_checkpoint(tmp_path, {"moe": changes})
    with pytest.raises(UserError, match=message) as caught:
        plan_null_experts(source, num_null, top_k)
    assert "\n" not in str(caught.value) and str(source) in str(caught.value)


def test_where_to(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    change = plan_null_experts(source, 4, 2)
    assert set_null_experts(source, tmp_path / "a" / "iter_0000003", change) == tmp_path / "a" / "iter_0000003"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = set_null_experts(source, tmp_path / "run", change)
    assert path == tmp_path / "run" / "checkpoints" / "iter_0000003" == find_checkpoint(str(tmp_path / "run"), path)
    for taken in (tmp_path / "a", tmp_path / "a" / "iter_0000003", tmp_path / "run", tmp_path / "source", source):
        with pytest.raises(UserError, match=r"--to .* has checkpoints already; give a new directory"):
            set_null_experts(source, taken, change)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--to .*file.* cannot be made"):
        set_null_experts(source, tmp_path / "file", change)
    with pytest.raises(UserError, match=r"--to .*nnn.* cannot be made \(File name too long\)"):
        set_null_experts(source, tmp_path / ("n" * 256), change)
    (tmp_path / "b" / "iter_0000003.tmp").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"iter_0000003\.tmp cannot be made \(File exists\); choose another or remove it"
    ):
        set_null_experts(source, tmp_path / "b", change)
    assert (tmp_path / "b" / "iter_0000003.tmp").exists()


def test_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    change = plan_null_experts(source, 4, 2)
    content = bytearray((source / "__1_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "__1_0.distcp").write_bytes(content)
    with pytest.raises(UserError, match=r"source/iter_0000003/__1_0\.distcp was changed or damaged"):
        set_null_experts(source, tmp_path / "to", change)
    assert list((tmp_path / "to").iterdir()) == []
