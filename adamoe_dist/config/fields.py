"""How a configuration key is declared: its default, its meaning and the values it takes."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union


def key(
    default: Any,
    doc: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a key: its default, its documentation and the range of a number.

    Args:
        default: the value where nothing is given; a list or mapping is copied for each tree.
        doc: what the key means, with its unit.
        at_least: smallest number allowed.
        above: the number must be greater than this.
        below: the number must be smaller than this.
    """
    metadata = {"doc": doc, "at_least": at_least, "above": above, "below": below}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, doc: str) -> Any:
    """Declare a nested section built from the dataclass ``cls``."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc})


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield ``(dotted path, field, type)`` for every key of a tree, sections followed."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{path}.")
        else:
            yield path, field, hints[field.name]


def nearest(name: str, known: list[str]) -> str:
    """Return a clause that names the known key nearest to ``name``, or lists the known ones."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not match:
        match = difflib.get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known keys: {', '.join(sorted(known)[:12])}"


def describe(kind: Any) -> str:
    """Name a key's type in words, for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin in (list, dict):
        return {list: "a list", dict: "a mapping"}[origin]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if kind is type(None) else words.get(kind, str(kind))


def coerce(value: Any, kind: Any) -> Any:
    """Return ``value`` as ``kind``; ``ValueError`` where it is not one.

    A whole number is taken for a number (``1`` for ``1.0``) and ``1e-4`` without a dot, which YAML reads as
    text, for the number it is; a single text where a list of texts is wanted is a list of one. Nothing else is
    converted.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return value
        raise ValueError
    if origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return coerce(value, argument)
            except ValueError:
                continue
        raise ValueError
    if origin is list and isinstance(value, list):
        return [coerce(item, arguments[0]) for item in value]
    if origin is list and arguments == (str,) and isinstance(value, str):
        return [value]
    if origin is dict and isinstance(value, dict):
        return value
    if kind is type(None) and value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError


def range_problem(value: Any, metadata: Any) -> str | None:
    """Say in words which bound of its declaration a number breaks, if any."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return "must be a finite number"
    if metadata.get("at_least") is not None and value < metadata["at_least"]:
        return f"must be at least {metadata['at_least']}"
    if metadata.get("above") is not None and value <= metadata["above"]:
        return f"must be greater than {metadata['above']}"
    if metadata.get("below") is not None and value >= metadata["below"]:
        return f"must be smaller than {metadata['below']}"
    return None
