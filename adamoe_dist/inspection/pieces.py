"""What each token of a sequence stands for."""

import codecs
from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, hence tokens of one


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return the text of each token, so that the texts in a row are the text of all.

    Each token is decoded behind the one before, since tokenizers drop white space at the start of what they decode.
    A character that several tokens make up is given to the last of them, and the others have none.

    Args:
        ids: token ids.
        decode: the text of several tokens; what is no whole character ends in U+FFFD.
    """
    texts: list[str] = []
    anchor = done = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(list(ids[anchor:done])), decode(list(ids[anchor:end]))
        is_last = end == len(ids) or end - done >= LONGEST_CHARACTER
        if now.endswith(UNFINISHED) and not is_last:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        anchor, done = done, end
    return texts


def name_of(piece: str, alone: str) -> str:
    """Return what a token is called in a list, by the tokenizer's piece of it.

    Bytes that are no whole character are written ``<0xB8>``, as pieces of byte fallback are; tokenizers of bytes write
    each as some letter.

    Args:
        piece: as the tokenizer has it in its vocabulary.
        alone: the text of this token alone.
    """
    if UNFINISHED in alone and all(letter in _BYTES for letter in piece):
        return bytes(_BYTES[letter] for letter in piece).decode("utf-8", errors=_AS_NUMBERS)
    return piece.replace("\u2581", " ")


def _as_numbers(problem: UnicodeError) -> tuple[str, int]:
    assert isinstance(problem, UnicodeDecodeError)
    wrong = problem.object[problem.start : problem.end]
    return "".join(f"<0x{byte:02X}>" for byte in wrong), problem.end


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level tokenizer stands for: GPT-2's alphabet."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_AS_NUMBERS = "adamoe_dist.bytes_as_numbers"
codecs.register_error(_AS_NUMBERS, _as_numbers)
_BYTES = _byte_letters()
