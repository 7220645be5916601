"""Who writes what."""

from hypothesis import given
from hypothesis import strategies as st

from adamoe_dist.checkpoint.balance import assign_writers


@given(st.lists(st.integers(0, 10**9), max_size=40), st.integers(1, 9))
def test_no_writer_has_more_than_the_mean_and_one_item(sizes: list[int], writers: int) -> None:
    writer_of = assign_writers(sizes, writers)
    assert len(writer_of) == len(sizes) and set(writer_of) <= set(range(writers))
    loads = [
        sum(size for size, writer in zip(sizes, writer_of, strict=True) if writer == each) for each in range(writers)
    ]
    assert max(loads) <= sum(sizes) / writers + max(sizes, default=0)
    assert assign_writers(sizes, writers) == writer_of


def test_large_items_come_first() -> None:
    assert assign_writers([1, 1, 1, 1, 4], 2) == [1, 1, 1, 1, 0]
