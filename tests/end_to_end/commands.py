"""Which commands of a document a test file really runs, read from its source."""

import ast
from collections.abc import Iterator

RUNNERS = {"run", "on_two_nodes", "Popen"}


def covered(fragment: str) -> str:
    """Marks a command, by a part of it, as run by a test; what counts is in :func:`fragments_run`."""
    return fragment


def fragments_run(source: str) -> set[str]:
    """The fragments in ``covered(...)`` of which ``only`` takes a command that a test hands to a runner.

    At once or by way of names; a fragment may be a parameter of the test.
    """
    tests = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {fragment for test in tests if test.name.startswith("test_") for fragment in _of_test(test)}


def _of_test(test: ast.FunctionDef) -> Iterator[str]:
    given = {
        parameter: mark.args[1]
        for mark in test.decorator_list
        if isinstance(mark, ast.Call) and _name(mark) == "parametrize" and isinstance(mark.args[0], ast.Constant)
        for parameter in [mark.args[0].value]
    }
    for part in _what_is_run(test):
        for choice in _calls(part, "only"):
            for node in ast.walk(choice):
                yield from _marked(given[node.id] if isinstance(node, ast.Name) and node.id in given else node)


def _what_is_run(test: ast.FunctionDef) -> list[ast.AST]:
    """The arguments of runners, and what was assigned to names in them."""
    parts: list[ast.AST] = [part for call in _calls(test, *RUNNERS) for part in call.args]
    assigned = [node for node in ast.walk(test) if isinstance(node, ast.Assign)]
    for part in parts:  # grows
        names = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        for node in assigned:
            targets = {one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
            if targets & names and node.value not in parts:
                parts.append(node.value)
    return parts


def _marked(node: ast.AST) -> list[str]:
    return [call.args[0].value for call in _calls(node, "covered") if isinstance(call.args[0], ast.Constant)]


def _calls(node: ast.AST, *names: str) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call) and _name(call) in names]


def _name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
