"""Sets of ranks, started when a test first asks for them and kept for the session."""

from collections.abc import Iterator

import pytest

from tests.distributed.harness import RanksOf, started_ranks


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[RanksOf]:
    """``ranks_of(n)``: n running ranks; a set that a failed check killed is replaced."""
    with started_ranks() as get:
        yield get
