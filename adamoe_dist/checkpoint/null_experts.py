"""Another number of null experts in a checkpoint; every other tensor stays where and as it is.

Files with tensors are copied and not read into memory. The null experts' new rows go to a file of their own, and a new
index names what is left of the old tensors and the new ones. Axes: E true experts, N null experts (rows that score
them: one for all with ``moe.router.null_init=shared``), H hidden size.
"""

import copy
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.checkpoint.compatibility import holds_weights_only
from adamoe_dist.checkpoint.directory import (
    SUBDIRECTORY,
    UNFINISHED,
    directory_name,
    has_checkpoints,
    publish,
)
from adamoe_dist.checkpoint.index import (
    METADATA,
    Index,
    read_index,
    read_tensor,
    write_index,
)
from adamoe_dist.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    OTHER_CHECKPOINT,
    OnBytes,
    build_manifest,
    copy_file,
    describe_file,
    read_config,
    read_manifest,
    require_unchanged,
    verify_files,
    write_json,
)
from adamoe_dist.checkpoint.records import TensorEntry
from adamoe_dist.checkpoint.tensors import moment_key, weight_key, write_block
from adamoe_dist.checkpoint.zero import ADAM_MOMENTS
from adamoe_dist.config import Config, config_from_dict, model_problems, resolve
from adamoe_dist.errors import UserError
from adamoe_dist.routing import NullInit, initial_null_rows, same_weights

NEW_TENSORS = "__null_experts.distcp"
_ROUTER = re.compile(r"model\.(decoder\.layers\.(\d+)\.mlp\.router)\.weight")
_OF_NULL_EXPERTS = re.compile(r".*\.mlp\.(router\.null_weight|null_experts\.\w+)")
_ROWS = re.compile(r".*\.mlp\.router\.null_weight")


@dataclass(frozen=True)
class Change:
    """What is to become of a checkpoint.

    Attributes:
        tree: its configuration, changed.
        null_init: how the null experts' rows are drawn anew; None keeps those there are.
        seed: of what is drawn.
    """

    tree: dict[str, Any]
    null_init: NullInit | None
    seed: int

    @property
    def num_null(self) -> int:
        """The new m."""
        return int(self.tree["moe"]["num_null_experts"])


def plan_null_experts(
    source: Path, num_null: int, top_k: int, null_init: NullInit | None = None, seed: int = 0
) -> Change:
    """Say what a checkpoint's configuration becomes with m = ``num_null`` and k = ``top_k``, or refuse.

    Args:
        source: the checkpoint directory.
        num_null: 0 makes a model without null experts.
        top_k: slots of a token.
        null_init: how the rows are drawn; None keeps them where their number stays or all null experts share one, and
            else draws them as the checkpoint's model did, from m = 0 as ``copy``.
        seed: of what is drawn.

    Raises:
        UserError: the model with these numbers would not be one that can be trained, or has weights that depend on the
            old ones.
    """
    old = config_from_dict(read_config(source)).moe
    if old.router.gating_residual and num_null != old.num_null_experts:
        raise UserError(
            f"{source} was trained with moe.router.gating_residual=true, whose learned weights are for "
            f"{old.num_null_experts} null experts and cannot be made for {num_null}; keep "
            f"--num-null-experts {old.num_null_experts}"
        )
    if old.router.target_load is not None and num_null == 0:
        raise UserError(
            f"{source} was trained with moe.router.target_load={old.router.target_load:g}, whose selection bias holds "
            "a load that only null experts make possible; --num-null-experts 0 cannot keep it, give at least 1"
        )
    is_shared = old.router.null_init == "shared" and min(num_null, old.num_null_experts) > 0
    is_kept = null_init is None and (num_null == old.num_null_experts or is_shared)
    if num_null == 0 or is_kept:
        null_init = None
    elif null_init is None:
        null_init = old.router.null_init if old.num_null_experts else "copy"
    tree = _changed_tree(_whole_tree(source), num_null, top_k, null_init)
    _require_trainable(source, tree)
    return Change(tree, null_init, seed)


def _whole_tree(source: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration with the keys that its version did not have yet."""
    return config_from_dict(read_config(source)).to_dict()


def _changed_tree(tree: dict[str, Any], num_null: int, top_k: int, null_init: NullInit | None) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    moe, router = tree["moe"], tree["moe"]["router"]
    if (num_null == 0) != (moe["num_null_experts"] == 0):
        router["normalize"] = same_weights(router["normalize"], router["score_function"], num_null)
    moe["num_null_experts"], moe["top_k"] = num_null, top_k
    if num_null == 0:
        router["null_init"] = Config().moe.router.null_init
        moe["null_types"] = dict.fromkeys(moe["null_types"], 0)
        return tree
    if null_init is not None:
        router["null_init"] = null_init
    if router["type"] == "topk":
        router["type"] = "adamoe"
    return tree


def _require_trainable(source: Path, tree: dict[str, Any]) -> None:
    world_size = read_manifest(source)["layout"].get("world_size")
    if type(world_size) is not int or world_size < 1:
        raise UserError(f"{source / MANIFEST} does not say on how many ranks it was saved; {OTHER_CHECKPOINT}")
    moe = tree["moe"]
    asked = f"--num-null-experts {moe['num_null_experts']} --top-k {moe['top_k']}"
    if holds_weights_only(source):  # of no run: the rest of the tree says nothing yet
        if problems := model_problems(config_from_dict(tree)):
            raise UserError(f"{asked} do not fit {source}: {'; '.join(problems)}")
        return
    try:
        resolve(config_from_dict(tree), world_size)
    except UserError as problem:
        raise UserError(f"{asked} do not fit {source}: {problem}") from problem


def changed_keys(source: Path, change: Change) -> dict[str, Any]:
    """Return the configuration keys that a run must set differently to continue, with their new values."""
    return dict(_differences(_whole_tree(source), change.tree, ""))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in new.items():
        if isinstance(value, dict):
            yield from _differences(old[name], value, f"{prefix}{name}.")
        elif old[name] != value:
            yield f"{prefix}{name}", value


def set_null_experts(source: Path, target: Path, change: Change, on_bytes: OnBytes | None = None) -> Path:
    """Write a changed copy of a checkpoint; it appears as a whole or not at all.

    Args:
        source: the checkpoint directory; nothing in it changes.
        target: a new directory of checkpoints, or in one the name that a checkpoint of this step has.
        change: from :func:`plan_null_experts`.
        on_bytes: told of every part of the files that was copied.

    Returns:
        The new checkpoint directory.

    Raises:
        UserError: ``target`` has checkpoints already or cannot be written, or a file of ``source`` is damaged.
    """
    manifest = read_manifest(source)
    step = manifest["step"]
    verify_files(source, [METADATA, CONFIG])
    try:
        root = _root(target, step)
        unfinished = root / (directory_name(step) + UNFINISHED)
        root.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as problem:
        raise UserError(
            f"--to {problem.filename} cannot be made ({problem.strerror}); choose another or remove it"
        ) from None
    try:
        _fill(source, unfinished, manifest, change, on_bytes)
        return publish(unfinished, root, step)
    except OSError as problem:
        raise UserError(f"{source} cannot be copied to {unfinished} ({problem}); choose another --to") from problem
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)


def _root(target: Path, step: int) -> Path:
    """Return the directory that the new checkpoint goes to, which has none yet."""
    name = directory_name(step)
    if target.name == name:
        root = target.parent
    else:
        root = target / SUBDIRECTORY if (target / SUBDIRECTORY).is_dir() else target
    if has_checkpoints(root):
        raise UserError(f"--to {target}: {root} has checkpoints already; give a new directory")
    return root


def bytes_to_copy(source: Path, change: Change) -> int:
    """Return how much :func:`set_null_experts` copies."""
    files = read_manifest(source)["files"]
    return sum(files[name]["bytes"] for name in _copied_files(source, _kept(source, change)))


def _fill(source: Path, unfinished: Path, manifest: dict[str, Any], change: Change, on_bytes: OnBytes | None) -> None:
    kept = _kept(source, change)
    files = {}
    for name in _copied_files(source, kept):
        files[name] = copy_file(source / name, unfinished / name, on_bytes)
        require_unchanged(source / name, files[name], manifest["files"][name])
    if change.null_init is not None:
        kept |= _write_new(unfinished / NEW_TENSORS, _new_tensors(unfinished, kept, change))
        files[NEW_TENSORS] = describe_file(unfinished / NEW_TENSORS)
    write_index(unfinished, kept)
    write_json(unfinished / CONFIG, change.tree)
    files |= {name: describe_file(unfinished / name) for name in (METADATA, CONFIG)}
    write_json(unfinished / MANIFEST, build_manifest(manifest["step"], manifest["layout"], files))


def _kept(source: Path, change: Change) -> dict[str, TensorEntry]:
    """Return the tensors that go over into the new checkpoint."""
    return {key: entry for key, entry in read_index(source).items() if not _is_replaced(key, change)}


def _is_replaced(key: str, change: Change) -> bool:
    """Tell whether a tensor goes, or makes room for a new one."""
    if change.num_null == 0:
        return _OF_NULL_EXPERTS.fullmatch(key) is not None
    return change.null_init is not None and _ROWS.fullmatch(key) is not None


def _copied_files(source: Path, kept: Index) -> list[str]:
    """Return the files that go over: not those that are written anew, nor those whose tensors all go."""
    needed = {block.file for entry in kept.values() for block in entry.blocks}
    files = read_manifest(source)["files"]
    return [
        name for name in files if name in needed or (name not in (METADATA, CONFIG) and not name.endswith(".distcp"))
    ]


def _new_tensors(path: Path, index: Index, change: Change) -> Iterator[tuple[str, Tensor]]:
    """Yield each MoE layer's null rows (N, H), and zeros for the moments that its true rows have."""
    std = config_from_dict(change.tree).model.init_std
    routers = [match for key in index if (match := _ROUTER.fullmatch(key))]
    assert change.null_init is not None
    for match in sorted(routers, key=lambda match: int(match[2])):
        rows_NH = drawn_null_rows(
            change.null_init, read_tensor(path, index, match[0]), change.num_null, std, change.seed, int(match[2])
        )
        name = f"{match[1]}.null_weight"
        yield weight_key(name), rows_NH
        for moment in ADAM_MOMENTS:
            if moment_key(f"{match[1]}.weight", moment) in index:
                yield moment_key(name, moment), torch.zeros_like(rows_NH)


def drawn_null_rows(kind: NullInit, weight_EH: Tensor, num_null: int, std: float, seed: int, layer: int) -> Tensor:
    """Return a layer's null rows (N, H), or (1, H) for ``shared``, drawn by a seed and the layer's number alone.

    Args:
        kind: how they are drawn.
        weight_EH: rows that score the true experts.
        num_null: m.
        std: standard deviation of rows that are drawn at random.
        seed: of the draws.
        layer: its number, from 0.
    """
    generator = platform.seeded_generator(seed, layer, wide=False)
    return initial_null_rows(
        kind,
        weight_EH,
        num_null,
        lambda rows: rows.normal_(0.0, std, generator=generator),
        generator=generator,
    )


def _write_new(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, TensorEntry]:
    """Write whole tensors to a new file one after the other; return their places."""
    places = {}
    with path.open("xb") as file:
        for key, value in tensors:
            block = write_block(file, path.name, (0,) * value.dim(), value)
            places[key] = TensorEntry(tuple(value.shape), value.dtype, (block,))
        file.flush()
        os.fsync(file.fileno())
    return places
