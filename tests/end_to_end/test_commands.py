"""A fragment counts as run only where its command reaches a runner."""

import pytest

from tests.end_to_end.commands import fragments_run


@pytest.mark.parametrize(
    ("body", "is_run"),
    [
        ("def test_a(): run(only(covered('x')), place)", True),
        ("def test_a():\n    command = with_port(only(covered('x')))\n    on_two_nodes([f'{command} 1'], place)", True),
        ("def test_a():\n    a = only(covered('x'))\n    b = a.replace('8', '2')\n    assert run(b).stdout", True),
        ("@pytest.mark.parametrize('f', [pytest.param(covered('x'))])\ndef test_a(f): run(only(f))", True),
        ("@pytest.mark.parametrize('f', [covered('x')])\ndef test_a(f): run('another')", False),
        ("def test_a(): covered('x')", False),
        ("def test_a():\n    command = only(covered('x'))\n    run('another')", False),
        ("def helper(): run(only(covered('x')))", False),
        ("def test_a():\n    '''run(only(covered('x')))'''", False),
    ],
)
def test_only_what_reaches_a_runner_counts(body, is_run) -> None:
    assert fragments_run(body) == ({"x"} if is_run else set())
