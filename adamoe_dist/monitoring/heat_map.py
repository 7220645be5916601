"""Heat maps as PNG files, drawn in milliseconds. Axes: R rows and C columns of cells, Y and X of picture elements."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from adamoe_dist.colours import rgb, sequential, text_on

Array = NDArray[Any]
FONT_SIZE = 13
PAGE, INK = "#ffffff", "#1a1a1a"
_HIGHEST_CELL, _LOWEST_CELL = 26, 9
_WIDEST_CELL, _NARROWEST_CELL = 46, 7
_WIDTH, _HEIGHT = 960, 520
"""Of the cells together, where their number allows."""
_WITH_NUMBERS = 34
"""Width of a cell from which on its number is written into it."""


@dataclass(frozen=True)
class HeatMap:
    """A picture of numbers, light (0) to dark (``highest`` and more).

    Attributes:
        title: what it shows.
        rows: labels of the rows, top first.
        columns: labels of the columns.
        row_axis: what the rows are.
        column_axis: what the columns are.
        highest: the number of the darkest shade.
        form: how a number is written, for ``format``.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    row_axis: str
    column_axis: str
    highest: float
    form: str

    def png(self, values_RC: Array) -> tuple[bytes, int, int]:
        """Return ``(PNG file, width, height)`` of the numbers (R, C); NaN stays white."""
        assert values_RC.shape == (len(self.rows), len(self.columns)), "a label for each row and column"
        font = _font()
        cell_x = _size_of_cell(len(self.columns), _WIDTH, _NARROWEST_CELL, _WIDEST_CELL)
        cell_y = _size_of_cell(len(self.rows), _HEIGHT, _LOWEST_CELL, _HIGHEST_CELL)
        left = int(max(map(font.getlength, [*self.rows, self.row_axis]))) + 14
        top = 2 * FONT_SIZE + 10
        cells_YX3 = _cells(self.shades(values_RC), cell_x, cell_y)
        height, width = cells_YX3.shape[:2]
        bottom = top + height
        size = (max(left + width + 12, left + int(font.getlength(self.title)), left + 330), bottom + 5 * FONT_SIZE + 14)
        picture = Image.new("RGB", size, PAGE)
        picture.paste(Image.fromarray(cells_YX3), (left, top))
        draw = ImageDraw.Draw(picture)
        draw.text((left, 6), self.title, fill=INK, font=font)
        draw.text((left - 8, top - 4), self.row_axis, fill=INK, font=font, anchor="rs")
        for place, label in _shown(self.rows, cell_y, FONT_SIZE + 1):
            draw.text((left - 8, top + (place + 0.5) * cell_y), label, fill=INK, font=font, anchor="rm")
        for place, label in _shown(self.columns, cell_x, max(map(font.getlength, self.columns)) + 6):
            draw.text((left + (place + 0.5) * cell_x, bottom + 4), label, fill=INK, font=font, anchor="ma")
        draw.text((left, bottom + FONT_SIZE + 8), self.column_axis, fill=INK, font=font)
        if cell_x >= _WITH_NUMBERS:
            self._write_numbers(draw, values_RC, left, top, cell_x, cell_y)
        self._add_legend(draw, left, bottom + 3 * FONT_SIZE)
        file = io.BytesIO()
        picture.save(file, format="PNG", compress_level=3)
        return file.getvalue(), *size

    def shades(self, values_RC: Array) -> Array:
        """Return the number of each cell's shade (R, C), from 0; -1 for NaN."""
        last = len(sequential()) - 1
        steps_RC = np.clip(np.rint(np.nan_to_num(values_RC / self.highest) * last), 0, last).astype(int)
        return np.where(np.isnan(values_RC), -1, steps_RC)

    def _write_numbers(
        self, draw: ImageDraw.ImageDraw, values_RC: Array, left: int, top: int, cell_x: int, cell_y: int
    ) -> None:
        inks = [text_on(shade) for shade in sequential()]
        shades_RC = self.shades(values_RC)
        for row, column in zip(*np.nonzero(shades_RC >= 0), strict=True):
            place = (left + (column + 0.5) * cell_x, top + (row + 0.5) * cell_y)
            ink = inks[shades_RC[row, column]]
            draw.text(place, format(values_RC[row, column], self.form), fill=ink, font=_font(), anchor="mm")

    def _add_legend(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        shades = sequential()
        width, steps = 34, len(shades) - 1
        for step, shade in enumerate(shades):
            x = left + step * width
            draw.rectangle((x, top, x + width - 1, top + FONT_SIZE), fill=shade, outline="#8c8c8c")
            if step % 2 == 0:
                label = format(self.highest * step / steps, self.form)
                draw.text((x + width / 2, top + FONT_SIZE + 4), label, fill=INK, font=_font(), anchor="ma")


def _size_of_cell(number: int, room: int, least: int, most: int) -> int:
    return max(least, min(most, room // number))


def _cells(shades_RC: Array, cell_x: int, cell_y: int) -> Array:
    """Return the cells' colours (Y, X, 3), uint8, with white lines between the larger ones."""
    colours = np.array([rgb(shade) for shade in (*sequential(), PAGE)], dtype=np.uint8)
    cells = colours[shades_RC].repeat(cell_y, axis=0).repeat(cell_x, axis=1)
    if min(cell_x, cell_y) >= 6:
        cells[cell_y - 1 :: cell_y] = 255
        cells[:, cell_x - 1 :: cell_x] = 255
    return cells


def _shown(labels: Sequence[str], cell: int, room: float) -> list[tuple[int, str]]:
    """Return the labels, with their places, that stand beside each other without touching: every n-th."""
    stride = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 1 << 20) if n * cell >= room)
    return list(enumerate(labels))[::stride]


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font
