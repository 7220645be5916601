"""Permutations that are a pure function of a key, the same with every version of numpy."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """Return a random permutation of ``range(size)``.

    numpy promises stable streams for its bit generators but not for ``Generator.permutation``, so the
    order is that of raw random words.

    Args:
        size: number of elements.
        key: what the order depends on; any change gives an unrelated permutation.

    Returns:
        Array of shape (size,).
    """
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
