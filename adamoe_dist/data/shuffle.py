"""Permutations that are a pure function of a key, the same with every version of numpy."""

import numpy as np
from numpy.typing import NDArray


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """Return a random permutation of ``range(size)``.

    numpy promises stable streams for its bit generators but not for ``Generator.permutation``, so the
    order is that of raw random words.

    Args:
        size: number of elements.
        key: non-negative integers; any change of one gives an unrelated permutation.

    Returns:
        Array of shape (size,).
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
