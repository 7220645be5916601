"""Words, scripts and kinds of characters: pure functions of text."""

import re
import unicodedata
from functools import lru_cache

_GRAMMAR = """
a about above after again against all also am an and another any are as at be because been before being below
between both but by can cannot could did do does doing down during each either else few for from further had has
have having he her here hers herself him himself his how i if in into is it its itself just may me might mine more
most must my myself neither no nor not now of off on once only onto or other our ours ourselves out over own shall
she should since so some such than that the their theirs them themselves then there these they this those though
through to too toward towards under until up upon us very was we were what when where whether which while who whom
whose why will with within without would yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_GRAMMAR.split())
"""English words that carry grammar rather than matter."""

SCRIPTS = (
    "Greek", "Cyrillic", "Armenian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil", "Thai", "Georgian", "Hangul",
    "Hiragana", "Katakana", "CJK",
)  # fmt: skip
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_CODE_SIGNS = frozenset("(){}[]=<>;_|&*/\\@#$%^~`+")
_CODE_SHARE = 0.1
_CODE_START = re.compile(
    r"\s*(@\w|#include\b|#!|>>> |\.\.\. |(def|class|import|from|return|elif|except|raise|const|let|var|function|public|"
    r"private|static|void|struct)\s\S.*[:;{}()=,.\w]$)"
)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where each run of letters begins and ends; an apostrophe between letters belongs to it."""
    return [match.span() for match in _WORD.finditer(text)]


@lru_cache(maxsize=65536)
def kind_of(text: str) -> str:
    """Return the kind of characters of a token, its white space aside.

    Returns:
        "part of a character" (no text), "white space", "digits", "punctuation and signs", "words" (ASCII letters),
        "Latin with accents", a script as "Cyrillic", "other scripts", or "letters mixed with others".
    """
    core = text.strip()
    if not text:
        return "part of a character"
    if not core:
        return "white space"
    if all(character.isnumeric() for character in core):
        return "digits"
    if not any(character.isalnum() for character in core):
        return "punctuation and signs"
    if not all(_is_of_word(character) for character in core):
        return "letters mixed with others"
    scripts = {script_of(character) for character in core if character.isalpha()}
    if len(scripts) > 1 and scripts <= {"words", "Latin with accents"}:
        return "Latin with accents"
    return scripts.pop() if len(scripts) == 1 else "other scripts"


@lru_cache(maxsize=65536)
def script_of(letter: str) -> str:
    """Return "words" for an ASCII letter, "Latin with accents", one of ``SCRIPTS``, or "other scripts"."""
    if letter.isascii():
        return "words"
    name = unicodedata.name(letter, "")
    if name.startswith("LATIN "):
        return "Latin with accents"
    return next((script for script in SCRIPTS if name.startswith(script.upper() + " ")), "other scripts")


def looks_like_code(line: str) -> bool:
    """Guess whether a line is of a program: by how it starts, or by the share of signs that prose seldom has.

    A rule of thumb: one sign in ten characters, or one at all in an indented line.
    """
    characters = [character for character in line if not character.isspace()]
    if not characters:
        return False
    if _CODE_START.match(line.rstrip()):
        return True
    signs = sum(character in _CODE_SIGNS for character in characters)
    is_indented = line.startswith(("    ", "\t"))
    return signs >= (1 if is_indented else 2) and (is_indented or signs >= _CODE_SHARE * len(characters))


def _is_of_word(character: str) -> bool:
    return character.isalpha() or character in "'\u2019" or unicodedata.category(character).startswith("M")
