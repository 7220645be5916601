"""Which rank writes what, so that all write about as much."""

from collections.abc import Sequence
from heapq import heapify, heapreplace


def assign_writers(sizes: Sequence[int], writers: int) -> list[int]:
    """Give each item to a writer: the largest first, each to the one that has least.

    No writer gets more than the mean plus one item. All ranks that hold the same items find the same answer.

    Args:
        sizes: of the items, in an order that all writers share.
        writers: how many there are.

    Returns:
        The writer of each item, from 0.
    """
    loads = [(0, writer) for writer in range(writers)]
    heapify(loads)
    writer_of = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        load, writer = loads[0]
        writer_of[item] = writer
        heapreplace(loads, (load + sizes[item], writer))
    return writer_of
