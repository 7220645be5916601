"""Which of a test's cases `make test` runs; `make test-full` runs all."""

from collections.abc import Collection
from typing import Any

import pytest


def quick(cases: Collection[Any], chosen: Collection[Any]) -> list[Any]:
    """All cases, each a value or a tuple of values, those that are not chosen marked as slow."""
    assert all(case in cases for case in chosen)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in chosen else pytest.mark.slow)
        for case in cases
    ]
