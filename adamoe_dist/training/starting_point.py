"""The checkpoint that fine-tuning starts from, and the model that is taken from it."""

from pathlib import Path
from typing import Any

from adamoe_dist import platform
from adamoe_dist.config import Config, flattened, leaves
from adamoe_dist.errors import UserError

TAKEN = ("model.", "moe.", "data.tokenizer")


def starting_checkpoint(config: Config) -> Path:
    """Return the checkpoint that the run continues from or takes its weights from.

    Raises:
        UserError: there is none.
    """
    platform.prepare()
    from adamoe_dist.checkpoint import find_start

    start = find_start(config)
    if start is None:
        raise UserError(
            f"checkpoint.resume={config.checkpoint.resume} finds nothing to continue in {config.run_dir} and "
            "checkpoint.load_weights is not set; give the checkpoint that fine-tuning is to start from"
        )
    return start.path


def check_trained_weights(source: Path, config: Config) -> None:
    """Refuse a name in ``finetune.trainable`` that matches no weight of a checkpoint; no model is built.

    Raises:
        UserError: naming it.
    """
    from adamoe_dist.checkpoint import read_index
    from adamoe_dist.model import check_trainable, is_adapter

    trainable = config.finetune.trainable
    if trainable != "all":
        names = [key.removeprefix("model.") for key in read_index(source) if key.startswith("model.")]
        check_trainable(trainable, sorted(name for name in names if not is_adapter(name)))


def router_in_effect(config: Config) -> str:
    """Return a line that lists the keys of ``moe.router`` that are not at their defaults, whoever set them."""
    default = flattened(Config().to_dict())
    changed = [
        f"{key}={value}"
        for key, value in flattened(config.to_dict()).items()
        if key.startswith("moe.router.") and value != default[key]
    ]
    return f"moe.router is in effect with {', '.join(changed) or 'its defaults'}"


def with_model_of(source: Path, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Add what a checkpoint says of its model and its tokenizer to raw values that do not say it.

    Args:
        source: the checkpoint directory.
        values: nested mappings, as a file and overrides give them.

    Returns:
        The values with ``model.*``, ``moe.*`` and ``data.tokenizer`` complete, and one line about it.
    """
    from adamoe_dist.checkpoint import read_config

    saved, filled, taken = read_config(source), _copy(values), []
    for path, _, _ in leaves(Config):
        *sections, last = path.split(".")
        there, here = _section(saved, sections), _section(filled, sections, make=True)
        if path.startswith(TAKEN) and there is not None and here is not None and last in there and last not in here:
            here[last] = there[last]
            taken.append(path)
    kept = [path for path, _, _ in leaves(Config) if path.startswith(TAKEN) and path not in taken]
    note = f"model.*, moe.* and data.tokenizer are those of {source} but for: {', '.join(kept) or 'nothing'}"
    return filled, [note]


def _copy(tree: Any) -> Any:
    return {name: _copy(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def _section(tree: Any, names: list[str], make: bool = False) -> dict[str, Any] | None:
    """Return an inner mapping, made where it is missing if asked; None where something else is in its place."""
    for name in names:
        if make and isinstance(tree, dict):
            tree.setdefault(name, {})
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None
