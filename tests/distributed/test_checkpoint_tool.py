"""Null experts put into a trained model and taken out again; checkpoints that are damaged or hostile are not loaded."""

import math
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adamoe_dist.checkpoint import check_compatible, plan_null_experts, set_null_experts, verify_files
from adamoe_dist.checkpoint.index import read_index, read_tensor
from adamoe_dist.config import config_from_dict
from tests.checkpoint.small import FILES, hostile_bytes, plant
from tests.checkpoint.test_hostile import IGNORED
from tests.distributed import checkpoint_checks as checks
from tests.distributed import tool_checks
from tests.distributed.cases import merged
from tests.distributed.checkpoint_checks import Layout
from tests.distributed.harness import RanksOf
from tests.distributed.test_checkpoint import assert_same_bits

pytestmark = pytest.mark.distributed

VANILLA = {"moe": {"num_null_experts": 0, "top_k": 2}}
ADAPTIVE = {"moe": {"num_null_experts": 8, "top_k": 3, "router": {"null_init": "copy"}}}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    index = read_index(path)
    return {key: read_tensor(path, index, key) for key in index}


def test_null_experts_come_and_go(ranks_of: RanksOf, tmp_path: Path) -> None:
    """A vanilla model of two ranks becomes adaptive and trains on two and on one; taken back it goes on as it was."""
    vanilla, adaptive = Layout(2, changes=VANILLA), Layout(2, changes=ADAPTIVE)
    alone = Layout(changes=ADAPTIVE)
    expected = ranks_of(2).run(checks.train_and_save, vanilla, tmp_path / "vanilla", 2, 2)[0]
    source = tmp_path / "vanilla" / "iter_0000002"
    before = tensors_of(source)

    path = set_null_experts(source, tmp_path / "adaptive", plan_null_experts(source, 8, 3))
    check_compatible(path, config_from_dict(adaptive.tree()).to_dict(), "abc")
    after = tensors_of(path)
    new = after.keys() - before.keys()
    assert len(new) == 9 and all(key.endswith(".mlp.router.null_weight") for key in new)
    assert all(torch.equal(after[key], value) for key, value in before.items())

    on_two = ranks_of(2).run(tool_checks.resume, adaptive, path, 2)[0]
    on_one = ranks_of(1).run(tool_checks.resume, alone, path, 2)[0]
    for resumed in (on_two, on_one):
        assert resumed.optimizer_step == 2
        for name, value in resumed.weights.items():
            assert torch.equal(value, after[f"model.{name}"]), name
            assert torch.equal(resumed.moments[name], after[f"optimizer.exp_avg.{name}"]), name
    assert all(math.isfinite(loss) for loss in on_two.outcome.losses)
    assert on_one.outcome.losses == pytest.approx(on_two.outcome.losses, rel=1e-6)
    trained = on_two.outcome.weights["decoder.layers.0.mlp.router.null_weight"]
    assert not torch.equal(trained, after["model.decoder.layers.0.mlp.router.null_weight"])

    back = set_null_experts(path, tmp_path / "back", plan_null_experts(path, 0, 2))
    returned = tensors_of(back)
    assert returned.keys() == before.keys()
    assert all(torch.equal(returned[key], value) for key, value in before.items())
    check_compatible(back, config_from_dict(vanilla.tree()).to_dict(), "abc")
    assert_same_bits(expected, ranks_of(2).run(checks.resume, vanilla, back, 2)[0][0])


def flip_a_bit(path: Path, _: Path) -> None:
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 3] ^= 8
    (path / "__0_0.distcp").write_bytes(content)


def truncate(path: Path, _: Path) -> None:
    content = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(content[:-1])


def remove(path: Path, _: Path) -> None:
    (path / "__0_0.distcp").unlink()


def take_from_another(path: Path, other: Path) -> None:
    assert (path / "__0_0.distcp").stat().st_size == (other / "__0_0.distcp").stat().st_size
    shutil.copy(other / "__0_0.distcp", path / "__0_0.distcp")


HARMS: list[tuple[Callable[[Path, Path], None], str]] = [
    (flip_a_bit, "was changed or damaged"),
    (truncate, "is incomplete"),
    (remove, "is missing"),
    (take_from_another, "was changed or damaged"),
]


def test_damaged_and_hostile_checkpoints_are_not_loaded(ranks_of: RanksOf, tmp_path: Path) -> None:
    """Each on two ranks that load all of them in turn, and then the whole one after all."""
    layout = Layout(2, changes=merged(VANILLA, {"model": {"num_layers": 1}}))
    for name, steps in (("run", 1), ("other", 2)):
        ranks_of(2).run(checks.train_and_save, layout, tmp_path / name, steps, 0)
    source, other, marker = tmp_path / "run" / "iter_0000001", tmp_path / "other" / "iter_0000002", tmp_path / "marker"
    paths, expected = [], []
    for number, (harm, message) in enumerate(HARMS):
        paths.append(Path(shutil.copytree(source, tmp_path / f"damaged{number}" / source.name)))
        harm(paths[-1], other)
        expected.append(("__0_0.distcp", message))
    for kind in ("pickle", "zip"):
        for name in (name for name in FILES if (source / name).exists()):
            paths.append(Path(shutil.copytree(source, tmp_path / f"{kind}_{name}" / source.name)))
            plant(paths[-1], name, hostile_bytes(kind, marker))
            expected.append((name, ""))
    outcomes = ranks_of(2).run(tool_checks.loads, layout, [*paths, source])
    assert not marker.exists()
    assert outcomes[0] == outcomes[1]
    for path, (name, message), outcome in zip(paths, expected, outcomes[0], strict=False):
        unread = IGNORED | {"config.json"}  # the run compares its configuration before it loads: check_compatible
        if name == "state.json":
            assert outcome["load_weights"] is None
            assert name in (outcome["load_checkpoint"] or ""), path
        elif name in unread:
            assert outcome == {"load_checkpoint": None, "load_weights": None}, path
        else:
            for refusal in outcome.values():
                assert refusal is not None and name in refusal and message in refusal and "\n" not in refusal, path
    assert outcomes[0][-1] == {"load_checkpoint": None, "load_weights": None}


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path.relative_to(root)): (status.st_mode, status.st_mtime_ns, 0 if path.is_dir() else status.st_size)
        for path in sorted(root.rglob("*"))
        if (status := path.lstat())
    }


def test_saving_writes_in_its_place_only_and_with_the_users_mask(ranks_of: RanksOf, tmp_path: Path) -> None:
    parent, root = tmp_path / "parent", tmp_path / "parent" / "run" / "checkpoints"
    root.mkdir(parents=True)
    (parent / "run" / "config.yaml").write_text("run: {}")
    (parent / "other_run" / "checkpoints" / "iter_0000001").mkdir(parents=True)
    (parent / "other_run" / "checkpoints" / "iter_0000001" / "manifest.json").write_text("{}")
    (parent / "note.tmp").write_text("")
    before = snapshot(tmp_path)
    ranks_of(2).run(tool_checks.save_with_umask, Layout(2), root, 0o027)
    after = snapshot(tmp_path)
    inside = {name for name in after if name.startswith("parent/run/checkpoints")}
    assert {name: entry for name, entry in after.items() if name not in inside} == {
        name: entry for name, entry in before.items() if name not in inside
    }
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    verify_files(root / "iter_0000002")
    for name in inside - {"parent/run/checkpoints"}:
        mode = stat.S_IMODE(after[name][0])
        assert mode == (0o750 if (tmp_path / name).is_dir() else 0o640), (name, oct(mode))
