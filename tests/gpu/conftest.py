"""Ranks on GPUs and on CPU cores, started when a test first asks for them."""

from collections.abc import Iterator

import pytest

from tests.distributed.harness import Ranks, RanksOf, started_ranks
from tests.end_to_end.conftest import workspace
from tests.gpu.places import missing

__all__ = ["workspace"]


@pytest.fixture(scope="session")
def cpus() -> Iterator[RanksOf]:
    """``cpus(n)``: n ranks on CPU cores."""
    with started_ranks() as get:
        yield get


@pytest.fixture(scope="session")
def gpus() -> Iterator[RanksOf]:
    """``gpus(n)``: n ranks on a GPU each; the test is skipped, with the reason, where there are too few."""
    with started_ranks(cuda=True) as get:

        def get_if_there(world: int) -> Ranks:
            reason = missing(world)
            if reason:
                pytest.skip(reason)
            return get(world)

        yield get_if_there


def pytest_runtest_setup() -> None:
    """Skip before any fixture is made."""
    reason = missing(1)
    if reason:
        pytest.skip(reason)
