"""Classes of tokens and the text of each token: pure functions."""

import pytest

from adamoe_dist.inspection.classes import classify, frequency_bands
from adamoe_dist.inspection.pieces import name_of, token_texts
from adamoe_dist.inspection.words import kind_of, looks_like_code, word_spans


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        ("", "part of a character"),
        (" \n\t", "white space"),
        (" 12", "digits"),
        ("½", "digits"),
        ("٣", "digits"),
        ("...", "punctuation and signs"),
        (" _", "punctuation and signs"),
        ("🙂", "punctuation and signs"),
        (" word", "words"),
        ("don't", "words"),
        (" naïve", "Latin with accents"),
        ("Привет", "Cyrillic"),
        ("λόγος", "Greek"),
        ("你好", "CJK"),
        ("カタ", "Katakana"),
        ("नमस्ते", "Devanagari"),
        ("መልካም", "other scripts"),
        ("aπ", "other scripts"),
        ("x1", "letters mixed with others"),
        (" end.", "letters mixed with others"),
    ],
)
def test_kinds(token, kind):
    assert kind_of(token) == kind


def test_words_are_runs_of_letters_with_apostrophes_inside():
    text = "It's 3 o’clock, x_y1 'quoted' naïve"
    assert [text[start:end] for start, end in word_spans(text)] == [
        "It's", "o’clock", "x", "y", "quoted", "naïve",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "is_code"),
    [
        ("def f(x):", True),
        ("    return x[0] + 1", True),
        ("import os", True),
        ("#include <stdio.h>", True),
        ("for (i = 0; i < n; i++) {", True),
        ("a = {'b': [1, 2]}", True),
        ("The cat sat on the mat (and slept).", False),
        ("    An indented paragraph of a document.", False),
        ("return to the house", True),  # a rule of thumb has its price
        ("He asked: why? Nobody knew.", False),
        ("   ", False),
    ],
)
def test_code_lines(line, is_code):
    assert looks_like_code(line) == is_code


def test_bands_of_frequency():
    bands = frequency_bands(["the"] * 10 + ["cat"] * 4 + ["dog"] * 3 + ["once"] + ["twice"] * 2 + [""] * 50)
    assert bands == {
        "the": "frequent words", "cat": "words in between", "dog": "words in between", "twice": "rare words",
        "once": "rare words",
    }  # fmt: skip
    assert set(frequency_bands(["a", "b"]).values()) == {"rare words"}, "a short text has no frequent words"
    assert frequency_bands([]) == {}


def test_groupings():
    tokens = [
        "The",
        " c",
        "at",
        " sees",
        " Zür",
        "ich",
        ",",
        " 12",
        "\n",
        "x",
        " =",
        " f(",
        "1",
        ")",
        "\n",
        "\n",
        "End",
    ]
    characters, frequency, piece, code = classify(tokens)

    def labels(grouping):
        return [grouping.labels[number] if number >= 0 else "" for number in grouping.classes_T]

    assert labels(characters)[:9] == [
        "function words", "other words", "other words", "other words", "Latin with accents", "other words",
        "punctuation and signs", "digits", "white space",
    ]  # fmt: skip
    assert labels(piece)[:7] == [
        "whole word",
        "first piece",
        "later piece",
        "whole word",
        "first piece",
        "later piece",
        "",
    ]
    assert labels(code) == ["prose"] * 9 + ["code"] * 7 + ["prose"]
    assert set(labels(frequency)[:6]) == {"rare words"} and labels(frequency)[6] == ""
    assert list(characters.labels) == sorted(
        characters.labels, key=lambda label: (-int(characters.mask_T(label).sum()), label)
    )


def test_the_texts_of_tokens_make_up_the_text():
    """A decoder that drops the first space, as SentencePiece's does, over tokens of single bytes and of words."""
    pieces = [
        b"\xe2\x96\x81The",
        b"\xe2\x96\x81c",
        b"\xc3",
        b"\xb6",
        b"\xf0",
        b"\x9f",
        b"\x99",
        b"\x82",
        b"!",
        b"\xe2\x96\x81",
    ]
    pieces += [b"\xff", b"a", b"\xf0", b"\x9f"]

    def decode(ids):
        text = b"".join(pieces[one] for one in ids).decode("utf-8", errors="replace").replace("\u2581", " ")
        return text.removeprefix(" ")

    ids = list(range(len(pieces)))
    texts = token_texts(ids, decode)
    assert texts[:10] == ["The", " c", "", "ö", "", "", "", "🙂", "!", " "]
    assert len(texts) == len(ids) and "".join(texts) == decode(ids)


@pytest.mark.parametrize(
    ("piece", "alone", "name"),
    [
        ("<0xB8>", "\ufffd", "<0xB8>"),  # byte fallback
        ("\u0120\u00d0", " \ufffd", " <0xD0>"),  # byte level: a space and half a letter
        ("\u00f0\u0141\u013b", "\ufffd", "<0xF0><0x9F><0x99>"),
        ("\u2581The", "The", " The"),
        ("\u00e9", "\u00e9", "\u00e9"),
    ],
)
def test_tokens_without_a_text_of_their_own_are_named_by_their_piece(piece, alone, name):
    assert name_of(piece, alone) == name
