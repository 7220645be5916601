"""From YAML and dotted overrides to a typed tree; every problem is found before any is reported."""

import dataclasses
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from adamoe_dist.config.fields import coerce, describe, leaves, nearest, range_problem
from adamoe_dist.config.tree import Config
from adamoe_dist.errors import UserError

T = TypeVar("T")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice in one mapping."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        name = loader.construct_object(key_node)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key_node.start_mark)
        seen.add(name)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides, whose values are YAML.

    Raises:
        UserError: the file is missing or malformed, a key is unknown, or a value has the wrong type or range. All
            problems of the tree are named in one message.
    """
    return config_from_dict(read_values(path, overrides))


def read_values(path: str | Path, overrides: Iterable[str] = (), option: str = "--config") -> dict[str, Any]:
    """Return what a YAML file and overrides say, and nothing else: the keys that they set, unchecked.

    Raises:
        UserError: the file is missing or malformed, or an override is no ``section.key=value``; ``option``, which named
            the file, stands in front.
    """
    values = _read_yaml(Path(path), option)
    for override in overrides:
        _apply_override(values, override)
    return values


def overridden_keys(overrides: Iterable[str]) -> frozenset[str]:
    """Return the dotted keys that ``section.key=value`` overrides set, those of a whole section one by one.

    Raises:
        UserError: an override is no ``section.key=value``.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _apply_override(values, override)
    return frozenset(_paths(values, ""))


def _paths(values: dict[Any, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def config_from_dict(values: dict[str, Any]) -> Config:
    """Build the tree from nested mappings, as :func:`load_config` does."""
    problems: list[str] = []
    config = _build(Config, values, "", problems)
    refuse(problems)
    return config


def refuse(problems: list[str]) -> None:
    """Raise one ``UserError`` for all problems found, if there are any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise UserError(f"{len(problems)} problems: {numbered}")


def _read_yaml(path: Path, option: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{option} {path}: no such file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"{option} {path}: cannot be read as UTF-8 text ({problem})") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as problem:
        where = str(problem).replace('"<unicode string>"', "it")
        raise UserError(f"{option} {path}: not valid YAML: {where}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{option} {path}: holds {type(values).__name__}, must be a mapping")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path or path.startswith("-"):
        raise UserError(f"argument {override!r} is not section.key=value (and no known option; see --help)")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as problem:
        raise UserError(f"{path}={text}: the value is not valid YAML: {problem}") from None
    node = values
    *parents, last = path.split(".")
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = node[parent] = {}
        node = child
    node[last] = value


def _build(cls: type[T], values: Any, prefix: str, problems: list[str]) -> T:
    """Build one section, following nested ones; problems are appended, defaults stand in for bad values."""
    if not isinstance(values, dict):
        problems.append(f"{prefix.rstrip('.')}={values!r} must be a mapping of keys")
        return cls()
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            problems.append(f"unknown key {prefix}{name}; {_suggest(cls, str(name), prefix)}")
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.", problems)
        else:
            try:
                arguments[name] = coerce(value, hints[name])
            except ValueError:
                problems.append(f"{prefix}{name}={value!r} must be {describe(hints[name])}")
                continue
            broken = range_problem(arguments[name], fields[name].metadata)
            if broken:
                problems.append(f"{prefix}{name}={value!r} {broken}")
    return cls(**arguments)


def _suggest(cls: type, name: str, prefix: str) -> str:
    """Name the nearest key: of the same section by its leaf, else of the whole tree by its path."""
    local = {path: f"{prefix}{path}" for path, _, _ in leaves(cls)} | {
        field.name: f"{prefix}{field.name}" for field in dataclasses.fields(cls)
    }
    clause = nearest(name, list(local))
    if clause.startswith("did you mean"):
        return f"did you mean {local[clause[len('did you mean ') : -1]]}?"
    return nearest(f"{prefix}{name}", [path for path, _, _ in leaves(Config)])
