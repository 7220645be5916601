"""Classes of tokens, by which loads are compared. Axes: T tokens."""

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adamoe_dist.inspection.record import Array
from adamoe_dist.inspection.words import FUNCTION_WORDS, kind_of, looks_like_code, word_spans

RARE = 2
NONE = -1


@dataclass(frozen=True, eq=False)
class Grouping:
    """One way to sort tokens.

    Attributes:
        name: what they are sorted by.
        rule: the rule, in words.
        labels: the classes that occur.
        classes_T: index of each token's class, -1: in none.
    """

    name: str
    rule: str
    labels: tuple[str, ...]
    classes_T: Array

    def mask_T(self, label: str) -> Array:
        """Tell which tokens are of a class."""
        mask: Array = self.classes_T == self.labels.index(label)
        return mask


@dataclass(frozen=True)
class _Place:
    """A token's word in lower case ("" for none), and which piece of it the token is."""

    word: str
    piece: str


def classify(texts: Sequence[str]) -> list[Grouping]:
    """Sort tokens in four ways: by characters, by how frequent their word is, by piece of the word, prose or code.

    Args:
        texts: from :func:`token_texts`.
    """
    places = _places(texts)
    bands = frequency_bands([place.word for place in places if place.piece in ("whole word", "first piece")])
    kinds = [_kind(text, place.word) for text, place in zip(texts, places, strict=True)]
    return [
        _grouping(
            "Characters",
            "what the token consists of; function words are a fixed list of English, those of German are other words",
            kinds,
        ),
        _grouping(
            "Frequency of the word in this text",
            "frequent: the commonest words that make up half of all; rare: words that occur once or twice",
            [bands.get(place.word, "") for place in places],
        ),
        _grouping("Piece of the word", "where words are runs of letters", [place.piece for place in places]),
        _grouping("Prose or code", "by the line that the token begins in, a rule of thumb", _code_labels(texts)),
    ]


def frequency_bands(words: Sequence[str]) -> dict[str, str]:
    """Return the band of each word: "frequent words", "words in between" or "rare words".

    Frequent are the commonest words that together make up half of ``words``, if they occur more often than rare ones
    may, which is twice.
    """
    counts = Counter(word for word in words if word)
    bands, seen = {}, 0
    for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        is_frequent = 2 * seen < counts.total() and count > RARE
        bands[word] = "frequent words" if is_frequent else "rare words" if count <= RARE else "words in between"
        seen += count
    return bands


def _places(texts: Sequence[str]) -> list[_Place]:
    whole = "".join(texts)
    spans = word_spans(whole)
    ends = [end for _, end in spans]
    places, start = [], 0
    for text in texts:
        first = start + len(text) - len(text.lstrip())
        last = start + len(text.rstrip())
        index = bisect.bisect_right(ends, first)
        start += len(text)
        if index == len(spans) or spans[index][0] >= max(last, first):
            places.append(_Place("", ""))
            continue
        begin, end = spans[index]
        is_whole = first <= begin and end <= last
        piece = "whole word" if is_whole else "first piece" if first <= begin else "later piece"
        places.append(_Place(whole[begin:end].casefold(), piece))
    return places


def _kind(text: str, word: str) -> str:
    kind = kind_of(text)
    if kind != "words":
        return kind
    return "function words" if word in FUNCTION_WORDS else "other words"


def _code_labels(texts: Sequence[str]) -> list[str]:
    """Label each token by the line that its first character stands in; a blank line is as the one before."""
    lines = "".join(texts).split("\n")
    labels, label = [], "prose"
    for line in lines:
        if line.strip():
            label = "code" if looks_like_code(line) else "prose"
        labels.append(label)
    of_tokens, number = [], 0
    for text in texts:
        of_tokens.append(labels[number])
        number += text.count("\n")
    return of_tokens


def _grouping(name: str, rule: str, names: Sequence[str]) -> Grouping:
    """Number the classes in the order of their size; the empty name is none."""
    counts = Counter(one for one in names if one)
    labels = tuple(one for one, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    numbers = {label: number for number, label in enumerate(labels)}
    return Grouping(name, rule, labels, np.array([numbers.get(one, NONE) for one in names], dtype=np.int16))
