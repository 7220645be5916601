"""Whether a run may continue from a checkpoint, and what it changes if so."""

from pathlib import Path
from typing import Any, NamedTuple

from adamoe_dist.checkpoint.manifest import read_config, read_manifest, read_state
from adamoe_dist.config import (
    ABSENT,
    ALLOW,
    TOTAL_STEPS,
    Resolved,
    automatic_micro_batch,
    compared_keys,
    is_allowed,
    rule_of,
)
from adamoe_dist.errors import UserError

FINGERPRINT = "tokenizer_fingerprint"
WEIGHTS_ONLY = "weights_only"
_TARGET_LOAD = "moe.router.target_load"
_ROUTER_TYPE = "moe.router.type"
_LORA = "finetune.lora."


class Difference(NamedTuple):
    """A key that is not as in the checkpoint."""

    key: str
    there: Any
    here: Any
    is_nameable: bool

    def __str__(self) -> str:
        if self.key == FINGERPRINT:
            return f"the tokenizer's fingerprint is {self.there} there, {self.here} here"
        in_effect = ""
        if self.key == TOTAL_STEPS:
            in_effect = " (where null, train.steps; the learning-rate curve and annealing are laid out for it)"
        return f"{self.key}{in_effect} is {self.there} there, {self.here} here"


def check_compatible(
    path: Path,
    config: dict[str, Any],
    tokenizer_fingerprint: str | None,
    weights_only: bool = False,
    samples: dict[str, Any] | None = None,
) -> list[str]:
    """Refuse a checkpoint that this run cannot continue from, or not without a word in ``checkpoint.allow_changes``.

    Args:
        path: the checkpoint directory.
        config: this run's resolved tree.
        tokenizer_fingerprint: of this run's tokenizer, compared with ``tokenizer_fingerprint`` in the checkpoint's
            state; None, here or there, skips the comparison.
        weights_only: compare only what the weights depend on: a new run starts from them.
        samples: the identity of this run's training samples, compared with ``data`` in the checkpoint's state; None
            skips the comparison.

    Returns:
        One line for each difference that ``checkpoint.allow_changes`` allows, and one where adapters are merged.

    Raises:
        UserError: naming every key that differs and may not, with both values.
    """
    if not weights_only:
        _require_moments(path)
    found = _differing_keys(read_config(path), config, weights_only)
    state = read_state(path) if tokenizer_fingerprint is not None or samples is not None else {}
    fingerprint = state.get(FINGERPRINT, ABSENT)
    if tokenizer_fingerprint is not None and fingerprint is not None and fingerprint != tokenizer_fingerprint:
        found.append(Difference(FINGERPRINT, fingerprint, tokenizer_fingerprint, False))
    if samples is not None and not weights_only:
        found += _differing_samples(state.get("data", {}), samples)
    allowed = [] if weights_only else config.get("checkpoint", {}).get("allow_changes", [])
    refused = [
        difference for difference in found if not (difference.is_nameable and is_allowed(difference.key, allowed))
    ]
    if refused:
        raise UserError(_refusal(path, refused, weights_only))
    notes = [f"{ALLOW}: {key} {there} -> {here}" for key, there, here, _ in found]
    rank = _lora_rank(read_config(path))
    if weights_only and rank is not None and _lora_rank(config) is None:
        notes.append(f"the adapters of rank {rank} in {path} are taken into its weights: this run has none")
    return notes


def holds_weights_only(path: Path) -> bool:
    """Tell whether no run has saved a checkpoint: it has no optimizer state and no place in any data."""
    return bool(read_state(path).get(WEIGHTS_ONLY))


def _require_moments(path: Path) -> None:
    if holds_weights_only(path):
        raise UserError(
            f"checkpoint {path} holds weights only, which a run cannot continue from; start a new run from them with "
            f"checkpoint.load_weights={path}"
        )


def _differing_keys(saved: dict[str, Any], config: dict[str, Any], weights_only: bool) -> list[Difference]:
    takes_adapters = _lora_rank(saved) is not None and _lora_rank(config) is not None
    return [
        Difference(key, there, here, _is_nameable(key, there, here))
        for key, there, here in compared_keys(saved, config)
        if there != here
        and not (there is None and here == ABSENT)
        and not (weights_only and _may_start_with(key, there, here) and not (takes_adapters and key.startswith(_LORA)))
    ]


def _lora_rank(config: dict[str, Any]) -> int | None:
    """Return the rank of a resolved tree's adapters; None: it has none, or is older than the key."""
    rank: int | None = config.get("finetune", {}).get("lora", {}).get("rank")
    return rank


def _is_nameable(key: str, there: Any, here: Any) -> bool:
    """Tell whether naming a key allows the change: a selection bias can be led elsewhere, but not come or go."""
    if key == _TARGET_LOAD:
        return there is not None and here is not None
    rule = rule_of(key)
    return rule is not None and rule.kind == "named"


def _may_start_with(key: str, there: Any, here: Any) -> bool:
    """Tell whether a new run may start from weights that were trained with another value.

    Another target load may, or a first one; but weights trained under a selection bias are not to lose it. Megatron's
    own router has the weights of AdaMoE's without null experts and routes alike.
    """
    if key == _ROUTER_TYPE:
        return (there, here) == ("topk", "adamoe")
    if key == _TARGET_LOAD:
        return there is None or here is not None
    rule = rule_of(key)
    return rule is not None and rule.resume_only


def _differing_samples(saved: dict[str, Any], samples: dict[str, Any]) -> list[Difference]:
    """Compare content and shares of the training sets; where they are does not matter."""

    def content(identity: dict[str, Any]) -> list[tuple[Any, Any]]:
        return [(part["fingerprint"], part["weight"]) for part in identity.get("datasets", [])]

    def described(identity: dict[str, Any]) -> str:
        parts = identity.get("datasets", [])
        named = [f"{Path(part['prefix']).name} {part['fingerprint'][:12]} x {part['weight']}" for part in parts]
        return f"[{', '.join(named)}]"

    if content(saved) == content(samples):
        return []
    return [Difference("data.train", described(saved), described(samples), True)]


def _refusal(path: Path, refused: list[Difference], weights_only: bool) -> str:
    listed = "; ".join(str(difference) for difference in refused)
    nameable = [difference.key for difference in refused if difference.is_nameable]
    if weights_only:
        has_lora = any(difference.key.startswith(_LORA) for difference in refused)
        merge = ", or finetune.lora.rank=null, which takes the adapters into the weights" if has_lora else ""
        return f"checkpoint {path} is of another run: {listed}; set them as there{merge}"
    if len(nameable) < len(refused):
        allow = f"; of these {ALLOW} can allow {', '.join(nameable)}" if nameable else ""
        remedy = f"set them as there, or start a new run in another run.dir{allow}"
        return f"checkpoint {path} is of another run: {listed}; {remedy}"
    return (
        f"checkpoint {path} was trained otherwise: {listed}; set them as there, or change them knowingly with "
        f"{ALLOW}=[{', '.join(nameable)}]"
    )


def notes_on_cut(path: Path, config: dict[str, Any], resolved: Resolved) -> list[str]:
    """Say where the way that this run is cut changes its numbers; :func:`check_compatible` has accepted the rest.

    Args:
        path: the checkpoint directory.
        config: this run's resolved tree.
        resolved: its arithmetic.

    Returns:
        One line for each part of the training that is computed over other sets of tokens than in the checkpoint's run.
    """
    saved, layout = read_config(path), {"tensor": 1, "context": 1, "data": 1, **read_manifest(path)["layout"]}
    before, now, here = _saved_micro_batch(saved, layout), resolved.micro_batch_size, resolved.layout
    router = config["moe"]["router"]
    scope, factor, notes = router["balance"]["scope"], router["capacity_factor"], []
    if scope == "global_batch":
        counted = before * layout["data"], now * here.data
    else:
        counted = before, now
    if router["balance"]["type"] != "none" and counted[0] != counted[1]:
        notes.append(
            f"the balance loss (moe.router.balance.scope={scope}) counts loads over {counted[1]} samples at a time "
            f"here, {counted[0]} in the checkpoint's run: its value changes a little"
        )
    ranks = layout["tensor"] * layout["context"], here.tensor * here.context
    if factor is not None and before * ranks[1] != now * ranks[0]:
        notes.append(
            f"moe.router.capacity_factor={factor:g} limits the tokens of {now} samples on {ranks[1]} ranks here, of "
            f"{before} on {ranks[0]} in the checkpoint's run: other tokens are dropped"
        )
    return notes


def _saved_micro_batch(saved: dict[str, Any], layout: dict[str, Any]) -> int:
    train = saved["train"]
    if train["micro_batch_size"] != "auto":
        return int(train["micro_batch_size"])
    sequence = saved["model"]["sequence_length"] // layout["context"]
    return automatic_micro_batch(train["global_batch_size"] // layout["data"], sequence)
