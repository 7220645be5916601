"""Charts made of rectangles and labels: bars in a table, and heat maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adamoe_dist.inspection.drawing import CHARACTER_WIDTH, Corner, Drawing, Label, Line, Rectangle

ROW = 22.0
HEAD = 26.0
BAR = 150.0
CELL_WIDTH, CELL_HEIGHT = 44.0, 22.0
_LONGEST_LABEL = 34
_MARK = 7.0
_ABOVE = ("d5", "d6", "d7", "d8")


@dataclass(frozen=True)
class Column:
    """A column of bars.

    Attributes:
        title: its head.
        values: a number for each row; NaN is left out.
        texts: how each number is written.
        highest: the number that fills the column; with ``is_signed`` on either side of its middle.
        is_signed: bars go to the left (blue) and to the right (orange) of the middle.
        marked: a number at which a dashed line stands.
    """

    title: str
    values: Sequence[float]
    texts: Sequence[str]
    highest: float
    is_signed: bool = False
    marked: float | None = None


def bar_table(title: str, labels: Sequence[str], columns: Sequence[Column]) -> Drawing:
    """Return a chart with a row for each label and bars with their numbers in each column."""
    cut = [label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "\u2026" for label in labels]
    left = CHARACTER_WIDTH * max(map(len, cut), default=0) + 12
    lengths = [CHARACTER_WIDTH * max([len(text) for text in column.texts] + [0]) + 8 for column in columns]
    places = [left + sum(BAR + length + 18 for length in lengths[:index]) for index in range(len(columns))]
    width = places[-1] + BAR + lengths[-1]
    drawing = Drawing(title, math.ceil(width), HEAD + ROW * len(labels) + 4)
    for index, label in enumerate(cut):
        drawing.shapes.append(Label(left - 8, HEAD + ROW * index + 15, label, "end"))
    for column, x in zip(columns, places, strict=True):
        _add_column(drawing, column, x)
    return drawing


def _add_column(drawing: Drawing, column: Column, x: float) -> None:
    shapes = drawing.shapes
    shapes.append(Label(x, 14, column.title, colour="muted"))
    zero = x + BAR / 2 if column.is_signed else x
    scale = (BAR / 2 if column.is_signed else BAR) / max(column.highest, 1e-12)
    bottom = HEAD + ROW * len(column.values)
    shapes.append(Line(zero, HEAD, zero, bottom, "grid"))
    for index, (value, text) in enumerate(zip(column.values, column.texts, strict=True)):
        y = HEAD + ROW * index
        if not math.isnan(value):
            length = min(abs(value) * scale, BAR / 2 if column.is_signed else BAR)
            colour = ("plus" if value > 0 else "minus") if column.is_signed else "bar"
            start = zero - length if value < 0 else zero
            shapes.append(Rectangle(round(start, 1), y + 4, round(length, 1), ROW - 8, colour, text))
        shapes.append(Label(x + BAR + 6, y + 15, text))
    if column.marked is not None:
        place = round(zero + column.marked * scale, 1)
        shapes.append(Line(place, HEAD - 4, place, bottom, "ink", is_dashed=True))


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    highest: float,
    is_signed: bool = False,
) -> Drawing:
    """Return a map of cells, each with its number.

    Args:
        title: what it shows.
        rows: their labels.
        columns: their labels, written upright where they are long.
        values: a number for each cell; NaN cells stay empty.
        texts: what stands in each cell.
        highest: the number of the darkest shade; with ``is_signed``, of the strongest orange, and less it of blue.
        is_signed: shades are those of differences; orange cells have a mark, for eyes and printers without colours.
    """
    left = CHARACTER_WIDTH * max(map(len, rows), default=0) + 12
    longest = max(map(len, columns), default=0)
    is_upright = longest > 5
    top = CHARACTER_WIDTH * longest + 10 if is_upright else HEAD
    drawing = Drawing(title, left + CELL_WIDTH * len(columns) + 4, math.ceil(top + CELL_HEIGHT * len(rows) + 4))
    for index, label in enumerate(columns):
        x = left + CELL_WIDTH * (index + 0.5)
        anchor = "start" if is_upright else "middle"
        drawing.shapes.append(Label(x + 4 * is_upright, top - 6, label, anchor, "muted", is_upright=is_upright))
    for row, label in enumerate(rows):
        y = top + CELL_HEIGHT * row
        drawing.shapes.append(Label(left - 8, y + 15, label, "end"))
        for column, (value, text) in enumerate(zip(values[row], texts[row], strict=True)):
            x = left + CELL_WIDTH * column
            _add_cell(drawing, x, y, shade_of(value, highest, is_signed), text)
    return drawing


def _add_cell(drawing: Drawing, x: float, y: float, shade: str | None, text: str) -> None:
    if shade is None:
        drawing.shapes.append(Label(x + CELL_WIDTH / 2, y + 15, "\u00b7", "middle", "muted"))
        return
    drawing.shapes.append(Rectangle(x, y, CELL_WIDTH - 1, CELL_HEIGHT - 1, shade))
    if shade in _ABOVE:
        drawing.shapes.append(Corner(x + CELL_WIDTH - 1, y, _MARK, f"on-{shade}"))
    drawing.shapes.append(Label(x + CELL_WIDTH / 2, y + 15, text, "middle", f"on-{shade}"))


def shade_of(value: float, highest: float, is_signed: bool = False) -> str | None:
    """Return the name of a number's shade, None for NaN."""
    if math.isnan(value):
        return None
    part = value / max(highest, 1e-12)
    if is_signed:
        return f"d{4 + max(-4, min(4, round(4 * part)))}"
    return f"s{max(0, min(8, round(8 * part)))}"
