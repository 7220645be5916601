"""Samples to fine-tune on; their order is a pure function of seed, data and sample number."""

import hashlib
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamoe_dist.data.example_store import ExampleStore
from adamoe_dist.data.micro_batch import MaskedSample
from adamoe_dist.data.shuffle import permutation

_OPEN_SEQUENCES = 32
_EPOCHS_KEPT = 2


def packed(lengths: NDArray[np.int64], order: NDArray[np.int64], most: int) -> list[list[int]]:
    """Put examples into sequences, whole, in an order: each into the first open sequence that has room.

    Args:
        lengths: tokens of each example (examples,), at most ``most``.
        order: in which they are placed (examples,).
        most: tokens of a sequence.

    Returns:
        The examples of each sequence; the 32 sequences opened last are open.
    """
    closed: list[list[int]] = []
    members: list[list[int]] = []
    room: list[int] = []
    for example in order.tolist():
        length = int(lengths[example])
        place = next((index for index, left in enumerate(room) if left >= length), None)
        if place is None:
            if len(members) == _OPEN_SEQUENCES:
                closed.append(members.pop(0))
                room.pop(0)
            members.append([])
            room.append(most)
            place = len(members) - 1
        members[place].append(example)
        room[place] -= length
    return closed + members


class ExampleSamples:
    """An endless sequence of samples of ``sequence_length + 1`` tokens made of examples.

    A sample is one example or, packed, several whole ones, followed by padding. The examples of a packed sample are the
    same in every epoch; the order of the samples is new in each. Epoch e holds the samples ``e * len(self)`` to
    ``(e + 1) * len(self) - 1``.
    """

    def __init__(
        self,
        name: str,
        store: ExampleStore,
        sequence_length: int,
        seed: int,
        tokenizer_fingerprint: str,
        packing: bool = False,
        shuffle: bool = True,
    ) -> None:
        """Order the examples of ``store``, which are no longer than a sample.

        Args:
            name: what messages call it: the file.
            store: the examples.
            sequence_length: S, the tokens that a model predicts from one sample.
            seed: of the order.
            tokenizer_fingerprint: of the tokenizer that cut them.
            packing: put several examples into a sample.
            shuffle: false for the order of the file, every epoch alike.
        """
        self.prefix = name
        self.store = store
        self.sequence_length = sequence_length
        self.seed = seed
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.packing = packing
        self.shuffle = shuffle
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._sequences = packed(store.lengths, self._placing_order(), sequence_length + 1) if packing else None

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.store.ends) if self._sequences is None else len(self._sequences)

    @property
    def tokens(self) -> int:
        """Tokens that the loss is of."""
        return int(np.count_nonzero(self.store.targets))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token that the loss is of."""
        return self.store.counts.target_bytes / self.tokens

    @property
    def unigram_entropy(self) -> float:
        """Nats a token of a model that knows only the frequencies of the tokens that the loss is of."""
        return self.store.counts.target_entropy

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the examples, what is learnt of them, the tokenizer and the packing."""
        parts = (self._content, self.tokenizer_fingerprint, self.packing)
        return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the order and content of the samples."""
        part = {"prefix": self.prefix, "fingerprint": self.fingerprint, "seed": self.seed, "weight": "1"}
        return {"seed": self.seed, "sequence_length": self.sequence_length, "datasets": [part]}

    def __getitem__(self, index: int) -> MaskedSample:
        """Return sample ``index`` >= 0."""
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        epoch, position = divmod(int(index), len(self))
        place = int(self._order(epoch)[position]) if self.shuffle else position
        return self._sample([place] if self._sequences is None else self._sequences[place])

    def _sample(self, examples: list[int]) -> MaskedSample:
        tokens = np.full(self.sequence_length + 1, self.store.eod_id, dtype=np.int64)
        targets = np.zeros(self.sequence_length + 1, dtype=bool)
        filled = 0
        for example in examples:
            start = int(self.store.ends[example - 1]) if example else 0
            end = int(self.store.ends[example])
            into = slice(filled, filled + end - start)
            tokens[into], targets[into] = self.store.ids[start:end], self.store.targets[start:end]
            filled += end - start
        padding = np.arange(self.sequence_length) >= filled - 1  # nothing follows the last token
        return MaskedSample(tokens, targets[1:], padding)

    @cached_property
    def _content(self) -> str:
        return self.store.fingerprint()

    def _placing_order(self) -> NDArray[np.int64]:
        examples = len(self.store.ends)
        if not self.shuffle:
            return np.arange(examples, dtype=np.int64)
        return permutation(examples, "packing", self.seed, self._content)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs[epoch] = permutation(len(self), "examples", self.seed, self.fingerprint, epoch)
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
