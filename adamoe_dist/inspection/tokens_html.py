"""The text of a report: one element for each token, shaded by its mean load."""

from collections.abc import Iterator

import numpy as np

from adamoe_dist.inspection.drawing import escaped
from adamoe_dist.inspection.payload import mean_scale
from adamoe_dist.inspection.record import Routing, TokenizedText

BLOCK = 150
LONGEST_BLOCK = 600
NO_TEXT = "\u25ab"


def text_html(text: TokenizedText, routing: Routing) -> str:
    """Return the tokens of all files in blocks, which the browser lays out when they are looked at."""
    levels_T = mean_levels(routing)
    parts = []
    for start, stop in _blocks(text):
        heading = ""
        if len(text.sources) > 1 and (start == 0 or text.files_T[start] != text.files_T[start - 1]):
            heading = f"<h3>{escaped(text.sources[text.files_T[start]])}</h3>"
        tokens = "".join(token_html(text.texts[index], int(levels_T[index])) for index in range(start, stop))
        tokens = tokens.removesuffix("\n")  # the block ends the line
        parts.append(f'{heading}<div class="block">{tokens}</div>')
    return "".join(parts)  # white space between blocks would be a line of the text


def mean_levels(routing: Routing) -> "np.typing.NDArray[np.int64]":
    """Return the shade 0 to 8 of each token's mean load."""
    low, high = mean_scale(routing)
    # Rounded half up, as the page's script does.
    levels = np.floor((routing.mean_loads_T - low) / (high - low) * 8 + 0.5)
    return np.clip(levels, 0, 8).astype(np.int64)


def token_html(text: str, level: int) -> str:
    """Return a token's element; a line break is shown by a sign and kept, the last one behind the element."""
    visible = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "\u2192\t").replace("\n", "\u21b5\n")
    inner = visible.removesuffix("\n")
    return f"<i class=s{level}>{escaped(inner) or NO_TEXT}</i>{visible[len(inner) :]}"


def _blocks(text: TokenizedText) -> Iterator[tuple[int, int]]:
    """Yield the first and past-the-last token of blocks that end with a line if they can, and with a file."""
    start = 0
    for index in range(1, len(text) + 1):
        is_end = index == len(text) or text.files_T[index] != text.files_T[index - 1]
        length = index - start
        if is_end or length >= LONGEST_BLOCK or (length >= BLOCK and text.texts[index - 1].endswith("\n")):
            yield start, index
            start = index
