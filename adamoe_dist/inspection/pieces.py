"""What each token of a sequence stands for."""

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
