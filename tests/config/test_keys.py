"""No dead knobs: each key is read by the program, and stands explained in the shipped configuration."""

import ast
from pathlib import Path
from typing import Any

import yaml

import adamoe_dist
from adamoe_dist.config import Config, config_from_dict, leaves, load_config, resolve
from adamoe_dist.errors import UserError

PACKAGE = Path(adamoe_dist.__file__).parent
RESOLVED = {
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.expert",
    "parallel.expert_tensor",
    "train.micro_batch_size",
}
QUICKSTART = PACKAGE.parent / "configs" / "quickstart.yaml"


def attribute_reads() -> set[tuple[str, str]]:
    """(owner's last name, attribute) of every attribute that the library reads outside the declarations and checks.

    A local that holds a section counts under the section's name: ``moe = config.moe`` or ``model, moe = ...``.
    """
    reads: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "config" and path.parent.parent == PACKAGE and path.name != "tree.py":
            continue
        module = ast.parse(path.read_text())
        aliases = section_aliases(module)
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                reads.add((aliases.get(name, name), node.attr))
    return reads


def section_aliases(module: ast.Module) -> dict[str, str]:
    """Names bound to a section: ``settings = config.optimizer`` gives {settings: optimizer}."""
    aliases: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = (
                    list(zip(target.elts, node.value.elts, strict=True))
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
                for name, value in pairs:
                    if isinstance(name, ast.Name) and isinstance(value, ast.Attribute):
                        aliases[name.id] = value.attr
    return aliases


def test_every_key_is_read() -> None:
    reads = attribute_reads()
    unread = []
    for path, _, _ in leaves(Config):
        owner, _, name = path.rpartition(".")
        if (owner.rpartition(".")[2], name) not in reads and path not in RESOLVED:
            unread.append(path)
    assert not unread, f"declared but never read: {unread}"


def test_resolved_keys_change_the_arithmetic_or_are_refused() -> None:
    """The keys exempted above act through `resolve` alone."""
    outcomes = set()
    for path in sorted(RESOLVED):
        config = config_from_dict({"data": {"tokenizer": "t", "train": [{"path": "p"}]}, **nested(path, 2)})
        try:
            outcome = str(resolve(config, 2))
        except UserError as refusal:
            outcome = str(refusal)
            assert path in outcome
        outcomes.add(outcome)
    assert len(outcomes) == len(RESOLVED)


def nested(path: str, value: int) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: nested(rest, value) if rest else value}


def test_quickstart_names_and_explains_every_key() -> None:
    lines = QUICKSTART.read_text().splitlines()
    values = yaml.safe_load(QUICKSTART.read_text())
    for path, _, _ in leaves(Config):
        node = values
        for part in path.split("."):
            assert part in node, f"{path} is not in {QUICKSTART.name}"
            node = node[part]
    for number, line in enumerate(lines):
        stripped = line.strip()
        if stripped and not stripped.startswith(("#", "-")) and not lines[number - 1].strip().startswith(("#", "-")):
            is_entry_field = stripped.startswith(("path:", "weight:"))
            assert is_entry_field, f"line {number + 1} of {QUICKSTART.name} has no comment above it: {line}"


def test_quickstart_comments_are_the_declared_documentation() -> None:
    text = " ".join(line.strip().lstrip("# ") for line in QUICKSTART.read_text().splitlines())
    for path, field, _ in leaves(Config):
        assert " ".join(field.metadata["doc"].split()) in text, f"{path} is explained otherwise than declared"


def test_shipped_configurations_load() -> None:
    for path in sorted(QUICKSTART.parent.rglob("*.yaml")):
        load_config(path)
