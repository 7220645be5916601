"""What each key means for a run that continues from a checkpoint: fixed, changed by name only, or free."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from adamoe_dist.config.fields import leaves, nearest
from adamoe_dist.config.tree import Config

Kind = Literal["fixed", "named", "free"]
ALLOW = "checkpoint.allow_changes"
ABSENT = "absent"
TOTAL_STEPS = "schedule.total_steps"


@dataclass(frozen=True)
class Rule:
    """What holds for a key, or for a section but for the keys in it that have a rule of their own.

    fixed: a resumed run has the checkpoint's value. named: it may have another where ``checkpoint.allow_changes`` names
    the key, because the numbers of the run change with it. free: the numbers stay, but for rounding, or are not the
    training's.

    Attributes:
        key: of the configuration.
        kind: one of the three.
        reason: why.
        resume_only: weights alone may be taken by a run with another value.
    """

    key: str
    kind: Kind
    reason: str
    resume_only: bool = False


def _fixed(key: str, reason: str, resume_only: bool = False) -> Rule:
    return Rule(key, "fixed", reason, resume_only)


def _named(key: str, reason: str) -> Rule:
    return Rule(key, "named", reason, resume_only=True)


def _free(key: str, reason: str) -> Rule:
    return Rule(key, "free", reason, resume_only=True)


RULES = (
    _fixed("model", "shapes and meaning of the weights"),
    _fixed("model.sequence_length", "the samples are cut by it", resume_only=True),
    _fixed("model.init_std", "the run would not be one that a single start could have given", resume_only=True),
    _fixed("moe.num_experts", "shape of the experts and of the router"),
    _fixed("moe.num_null_experts", "shape of the null rows; the load that training settled at"),
    _fixed("moe.top_k", "the load that training settled at"),
    _fixed("moe.expert_hidden_size", "shape of the experts"),
    _fixed("moe.shared_expert_hidden_size", "shape of the shared expert"),
    _fixed("moe.shared_expert_gate", "weights of the shared expert"),
    _fixed("moe.layer_frequency", "which layers have experts"),
    _fixed("moe.dense_layers", "which layers have experts"),
    _fixed("moe.null_types", "what the null experts return; their weights"),
    _fixed("moe.router.type", "weights of the router"),
    _fixed("moe.router.score_function", "meaning of the router's weights"),
    _fixed("moe.router.gating_residual", "weights of the router"),
    _fixed("moe.router.normalize", "scale of the experts' outputs"),
    _fixed("moe.router.null_init", "one row for all null experts, or one each"),
    _fixed("run.seed", "order of the data", resume_only=True),
    _fixed("optimizer.type", "moments in the checkpoint", resume_only=True),
    _named("moe.router.target_load", "where the selection bias is moved to"),
    _named("moe.router.bias_rate", "how the selection bias moves"),
    _named("moe.router.bias_decay_steps", "how the selection bias moves"),
    _named("moe.router.balance", "the loss"),
    _named("moe.router.z_loss_coefficient", "the loss"),
    _named("moe.router.capacity_factor", "which tokens are dropped"),
    _named("moe.router.drop_policy", "which tokens are dropped"),
    _named("moe.dispatcher.pad_to_capacity", "which tokens are dropped"),
    _named("moe.dispatcher.dtype", "rounding of every row"),
    _named("optimizer", "the update"),
    _named("schedule", "the learning-rate curve"),
    _named("train.global_batch_size", "the gradient"),
    _named("train.gradient_clipping", "the update"),
    _named("data.train", "the samples: content and shares of the sets"),
    _fixed("finetune.trainable", "moments in the checkpoint", resume_only=True),
    _fixed("finetune.lora", "weights and moments in the checkpoint", resume_only=True),
    _named("finetune.loss_on", "the loss"),
    _named("finetune.packing", "the samples"),
    _named("finetune.too_long", "the samples"),
    _free("finetune.epochs", "what follows from it is train.steps"),
    _free("finetune.anneal_epochs", "what follows from it is moe.router.balance.anneal_steps"),
    _free("run.name", "a name"),
    _free("run.dir", "a place"),
    _free("run.deterministic", "the order of sums"),
    _free("moe.reference_top_k", "a metric's"),
    _free("moe.dispatcher.type", "the same sums on other ways"),
    _free("moe.dispatcher.flex_backend", "the same sums on other ways"),
    _free("moe.dispatcher.deduplicate", "the same sums on other ways"),
    _free("moe.dispatcher.overlap_shared_expert", "when it is computed"),
    _free("moe.experts", "the same products by another kernel"),
    _free("parallel", "a checkpoint's tensors are whole"),
    _free("zero", "a checkpoint's tensors are whole"),
    _free("optimizer.implementation", "the same update"),
    _free("data.validation", "a metric's"),
    _free("data.tokenizer", "its content is compared, wherever it is"),
    _free("data.prepare", "the content of what it makes is compared"),
    _free("train.max_bad_steps", "when the run gives up"),
    _free("train.steps", "where the run stops; what follows from it is schedule.total_steps"),
    _free("train.micro_batch_size", "how the batch is cut"),
    _free("train.precision", "masters and moments are fp32"),
    _free("train.recompute", "the same values, computed twice"),
    _free("train.validation_interval", "a metric's"),
    _free("train.validation_samples", "a metric's"),
    _free("checkpoint", "when to save and what to start from"),
    _free("monitor", "what is reported"),
)


def rule_of(key: str) -> Rule | None:
    """Return the rule of a key: the one that names it, or the innermost of its sections that has one."""
    name = key
    while name:
        for rule in RULES:
            if rule.key == name:
                return rule
        name = name.rpartition(".")[0]
    return None


def is_allowed(key: str, allowed: list[str]) -> bool:
    """Tell whether a list of keys and sections names a key or a section of it."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def check_allowed_changes(config: Config, problems: list[str]) -> None:
    """Add what is wrong with ``checkpoint.allow_changes`` to ``problems``."""
    allowed = config.checkpoint.allow_changes
    keys = [path for path, _, _ in leaves(Config)] if allowed else []
    for name in allowed:
        rules = [rule for key in keys if is_allowed(key, [name]) and (rule := rule_of(key)) is not None]
        kinds = {rule.kind for rule in rules}
        if not rules:
            problems.append(f"{ALLOW} names the unknown key {name}; {nearest(name, keys)}")
        elif "named" in kinds:
            continue
        elif "fixed" in kinds:
            problems.append(
                f"{ALLOW} names {name}, which a continued run cannot change ({rules[0].reason}); set it as in the "
                "checkpoint or start a new run, from its weights with checkpoint.load_weights"
            )
        else:
            problems.append(
                f"{ALLOW} names {name}, which may change unnamed ({rules[0].reason}); remove it from the list"
            )
    if allowed and config.checkpoint.resume == "none":
        problems.append(f"{ALLOW}={allowed} does nothing without checkpoint.resume; set both or neither")


def compared_keys(saved: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(key, value there, value here)`` of the keys that are not free, of two resolved trees.

    Where the saved tree is older than a key, the key counts as at its default: what is new is off by default.
    ``schedule.total_steps`` is the length in effect. ``data.train`` is left out: the content decides, not the paths.
    """
    there, here = flattened(Config().to_dict()) | flattened(saved), flattened(config)
    for key in {**there, **here}:
        rule = rule_of(key)
        if key == "data.train" or (rule is not None and rule.kind == "free"):
            continue
        if key == TOTAL_STEPS:
            if lays_out_steps(there) or lays_out_steps(here):
                yield key, total_steps(there), total_steps(here)
        else:
            yield key, there.get(key, ABSENT), here.get(key, ABSENT)


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree's values by dotted key."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def total_steps(values: dict[str, Any]) -> Any:
    """Return the length that a run's learning rate and annealing are laid out for, as :class:`Config` has it."""
    return values.get(TOTAL_STEPS) or values.get("train.steps")


def lays_out_steps(values: dict[str, Any]) -> bool:
    """Tell whether anything in a run depends on that length."""
    balance, router = "moe.router.balance", "moe.router"
    is_annealed = values.get(f"{balance}.type") != "none" and values.get(f"{balance}.final_coefficient") is not None
    return (
        values.get("schedule.decay") != "constant"
        or (is_annealed and values.get(f"{balance}.anneal_steps") is None)
        or (values.get(f"{router}.target_load") is not None and values.get(f"{router}.bias_decay_steps") is None)
    )
