"""Sets of ranks, started when a test first asks for them and kept for the session."""

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.harness import Ranks


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[Callable[[int], Ranks]]:
    """``ranks_of(n)``: n running ranks; a set that a failed check killed is replaced."""
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        ranks = started.get(world_size)
        if ranks is None or not all(process.is_alive() for process in ranks.processes):
            ranks = started[world_size] = Ranks(world_size)
        return ranks

    yield get
    for ranks in started.values():
        ranks.stop(kill=True)
