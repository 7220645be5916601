"""Options of this suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix-results", default=None, metavar="FILE", help="write what the layout matrix measured to FILE (JSON)"
    )
