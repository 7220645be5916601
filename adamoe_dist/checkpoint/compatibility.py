"""Which configuration keys a checkpoint fixes, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamoe_dist.checkpoint.manifest import read_config, read_state
from adamoe_dist.errors import UserError

FINGERPRINT = "tokenizer_fingerprint"
_ABSENT = "absent"
_OFF = (_ABSENT, None)  # a key that the checkpoint's version did not have yet was off


@dataclass(frozen=True)
class Fixed:
    """A key, or a whole section, that must be as in the checkpoint."""

    key: str
    reason: str
    resume_only: bool = False


FIXED = (
    Fixed("model.sequence_length", "the samples are cut by it", resume_only=True),
    Fixed("model.init_std", "the run would not be one that a single start could have given", resume_only=True),
    Fixed("model", "shapes and meaning of the weights"),
    Fixed("moe.num_experts", "shape of the experts and of the router"),
    Fixed("moe.num_null_experts", "shape of the null rows; the load that training settled at"),
    Fixed("moe.top_k", "the load that training settled at"),
    Fixed("moe.expert_hidden_size", "shape of the experts"),
    Fixed("moe.shared_expert_hidden_size", "shape of the shared expert"),
    Fixed("moe.layer_frequency", "which layers have experts"),
    Fixed("moe.router.type", "weights of the router"),
    Fixed("moe.null_types", "what the null experts return; their weights"),
    Fixed("moe.router.score_function", "meaning of the router's weights"),
    Fixed("moe.router.gating_residual", "weights of the router"),
    Fixed("moe.router.normalize", "scale of the experts' outputs"),
    Fixed("moe.router.target_load", "the bias that experts are selected with", resume_only=True),
    Fixed("moe.router.null_init", "one row for all null experts, or one each"),
    Fixed("run.seed", "order of the data", resume_only=True),
    Fixed("optimizer.type", "moments in the checkpoint", resume_only=True),
)


def check_compatible(
    path: Path, config: dict[str, Any], tokenizer_fingerprint: str | None, weights_only: bool = False
) -> None:
    """Refuse a checkpoint that this run cannot continue from.

    Args:
        path: the checkpoint directory.
        config: this run's resolved tree.
        tokenizer_fingerprint: of this run's tokenizer, compared with ``tokenizer_fingerprint`` in the checkpoint's
            state; None skips the comparison.
        weights_only: compare only what the weights depend on: a new run starts from them.

    Raises:
        UserError: naming every key that differs, with both values.
    """
    saved = read_config(path)
    differences = {
        key: f"{key} is {there} there, {here} here"
        for fixed in FIXED
        for key, there, here in _compare(fixed.key, saved, config)
        if there != here
        and not (there in _OFF and here in _OFF)
        and not (weights_only and _may_change(key, there, here))
    }
    if tokenizer_fingerprint is not None:
        there = read_state(path).get(FINGERPRINT, _ABSENT)
        if there != tokenizer_fingerprint:
            differences[FINGERPRINT] = f"the tokenizer's fingerprint is {there} there, {tokenizer_fingerprint} here"
    if differences:
        remedy = "set them as there" if weights_only else "set them as there, or start a new run in another run.dir"
        raise UserError(f"checkpoint {path} is of another run: {'; '.join(differences.values())}; {remedy}")


def _may_change(key: str, there: Any, here: Any) -> bool:
    """Tell whether a new run may start from weights that were trained with another value.

    Another target load may, or a first one; but weights trained under a selection bias are not to lose it.
    """
    if key == "moe.router.target_load":
        return there in _OFF or here is not None
    return _governing(key).resume_only


def _governing(key: str) -> Fixed:
    """The first entry of the table that names a key or its section."""
    return next(fixed for fixed in FIXED if key == fixed.key or key.startswith(f"{fixed.key}."))


def _compare(key: str, saved: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(key, value there, value here)`` of a key or of every key below it."""
    there, here = _look_up(saved, key), _look_up(config, key)
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            yield from _compare(f"{key}.{name}", saved, config)
    else:
        yield key, there, here


def _look_up(tree: dict[str, Any], key: str) -> Any:
    value: Any = tree
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return _ABSENT
        value = value[name]
    return value
