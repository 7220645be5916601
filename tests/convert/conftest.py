"""What the conversion tests share."""

from collections.abc import Iterator

import pytest

from adamoe_dist import platform
from tests.distributed.harness import RanksOf, started_ranks

platform.prepare()


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[RanksOf]:
    """``ranks_of(n)``: n running ranks."""
    with started_ranks() as get:
        yield get
