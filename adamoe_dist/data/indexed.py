"""Samples of fixed length from a prepared part; their order is a pure function of seed, data and index."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adamoe_dist.data.shuffle import permutation
from adamoe_dist.data.storage import PartInfo, open_tokens, read_info
from adamoe_dist.errors import UserError

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class _Epoch:
    """The order of one pass over the data.

    Attributes:
        documents: document ids in their order, shape (documents,).
        ends: tokens up to and including each of them, shape (documents,).
        windows: window ids in their order, shape (samples,).
    """

    documents: NDArray[np.int64]
    ends: NDArray[np.int64]
    windows: NDArray[np.int64]


class TokenDataset:
    """An endless sequence of samples of ``sequence_length + 1`` tokens.

    Each epoch concatenates the documents in a new order and cuts windows that overlap by one token; their
    order is new, too. Epoch e holds the samples ``e * len(self)`` to ``(e + 1) * len(self) - 1``.
    """

    def __init__(self, prefix: str | Path, sequence_length: int, seed: int, shuffle: bool = True) -> None:
        """Open a part that ``tools/prepare_data.py`` wrote.

        Args:
            prefix: path without ``.bin``.
            sequence_length: S, the tokens that a model predicts from one sample.
            seed: of the order.
            shuffle: false for the windows of the documents as they were written, every epoch alike.

        Raises:
            UserError: the part is missing or damaged, or has less than one sample.
        """
        self.prefix = str(prefix)
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self.info: PartInfo = read_info(prefix)
        if self.info.tokens < sequence_length + 1:
            raise UserError(
                f"data {prefix}: not enough data: {self.info.tokens} tokens are less than one sample of "
                f"sequence_length + 1 = {sequence_length + 1}; "
                "prepare more text or shorten model.sequence_length"
            )
        self._tokens: Any = open_tokens(prefix, self.info)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def __len__(self) -> int:
        """Samples of one epoch."""
        return (self.info.tokens - 1) // self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the part."""
        return self.info.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, end-of-document ids counted as tokens."""
        return self.info.bytes / self.info.tokens

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the part's own token frequencies, in nats a token."""
        return self.info.unigram_entropy

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that cut the text."""
        return self.info.tokenizer_fingerprint

    @property
    def fingerprint(self) -> str:
        """See :attr:`PartInfo.fingerprint`."""
        return self.info.fingerprint

    def identity(self) -> dict[str, Any]:
        """Return everything that decides the order and content of the samples."""
        part = {"prefix": self.prefix, "fingerprint": self.fingerprint, "seed": self.seed, "weight": "1"}
        return {"seed": self.seed, "sequence_length": self.sequence_length, "datasets": [part]}

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return sample ``index`` >= 0, of shape (sequence_length + 1,)."""
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        number, position = divmod(int(index), len(self))
        epoch = self._epoch(number if self.shuffle else 0)
        start = int(epoch.windows[position]) * self.sequence_length
        return self._read(epoch, start, self.sequence_length + 1)

    def _read(self, epoch: _Epoch, start: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` tokens from position ``start`` of the epoch's concatenated documents."""
        tokens = np.empty(count, dtype=np.int64)
        at = int(np.searchsorted(epoch.ends, start, side="right"))
        filled = 0
        while filled < count:
            document = int(epoch.documents[at])
            left = int(epoch.ends[at]) - (start + filled)
            offset = int(self._tokens.sequence_lengths[document]) - left
            take = min(left, count - filled)
            tokens[filled : filled + take] = self._tokens.get(document, offset, take)
            filled += take
            at += 1
        return tokens

    def _epoch(self, number: int) -> _Epoch:
        if number in self._epochs:
            self._epochs.move_to_end(number)
            return self._epochs[number]
        lengths = np.asarray(self._tokens.sequence_lengths, dtype=np.int64)
        if self.shuffle:
            key = (self.seed, self.fingerprint, number)
            documents = permutation(len(lengths), "documents", *key)
            windows = permutation(len(self), "windows", *key)
        else:
            documents = np.arange(len(lengths), dtype=np.int64)
            windows = np.arange(len(self), dtype=np.int64)
        epoch = _Epoch(documents, np.cumsum(lengths[documents]), windows)
        self._epochs[number] = epoch
        while len(self._epochs) > _EPOCHS_KEPT:
            self._epochs.popitem(last=False)
        return epoch
