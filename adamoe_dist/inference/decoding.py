"""Text of token ids as they arrive, one by one: whole characters only."""

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
_LEAD = 6


class TextStream:
    """Turns ids into text piece by piece; what is cut in the middle of a character waits for the rest.

    How a tokenizer writes an id may depend on the ids before it (a space at the beginning is dropped), so a few ids
    before the new ones are decoded with them, and their text is taken off.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begin after the ids ``before``, whose text is not given again."""
        self._tokenizer = tokenizer
        self._ids = list(before[-_LEAD:])
        self._from = 0
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        """Return what text is complete now; empty while a character is not."""
        self._ids.append(token_id)
        return self._take(is_last=False)

    def finish(self) -> str:
        """Return what is left, bytes without a character as the replacement character."""
        return self._take(is_last=True)

    def _take(self, is_last: bool) -> str:
        known, text = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        if len(text) <= len(known) or (text.endswith(INCOMPLETE) and not is_last):
            return ""
        self._from, self._read = max(self._from, self._read - _LEAD), len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first of the stop texts begins in ``text``."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(places, default=None)
