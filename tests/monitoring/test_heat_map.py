"""Heat maps: each cell has the shade of its number, where its labels say, and can be read in grey."""

import io

import numpy as np
import pytest
from PIL import Image

from adamoe_dist.colours import luminance, rgb, sequential
from adamoe_dist.monitoring import HeatMap


def a_map(rows: int, columns: int, highest: float = 3.0) -> HeatMap:
    return HeatMap(
        "A title",
        [str(row) for row in range(rows)],
        [str(column) for column in range(columns)],
        "layer",
        "true expert",
        highest,
        ".2f",
    )


def drawn(heat_map: HeatMap, values_RC: np.ndarray) -> np.ndarray:
    png, width, height = heat_map.png(values_RC)
    picture = np.asarray(Image.open(io.BytesIO(png)))
    assert picture.shape == (height, width, 3)
    return picture


def box_of(heat_map: HeatMap, row: int, column: int, value: float) -> tuple[list[int], tuple[int, ...]]:
    """Where one cell is, as [top, bottom, left, right], and its most frequent colour: what it adds to a white map."""
    empty_RC = np.full((len(heat_map.rows), len(heat_map.columns)), np.nan)
    one_RC = empty_RC.copy()
    one_RC[row, column] = value
    picture = drawn(heat_map, one_RC)
    changed = (picture != drawn(heat_map, empty_RC)).any(axis=2)
    (down,), (right,) = np.nonzero(changed.any(axis=1)), np.nonzero(changed.any(axis=0))
    colours, counts = np.unique(picture[changed], axis=0, return_counts=True)
    return [down[0], down[-1], right[0], right[-1]], tuple(colours[counts.argmax()].tolist())


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (24, 64), (60, 256)])
def test_each_cell_has_its_place_and_the_shade_of_its_number(rows: int, columns: int) -> None:
    heat_map = a_map(rows, columns)
    (top, bottom, left, right), _ = box_of(heat_map, 0, 0, 3.0)
    height, width = bottom - top + 2, right - left + 2  # and the white lines
    for row, column, step in [(0, 0, 8), (rows - 1, 0, 2), (1, columns - 1, 5), (rows - 1, columns - 2, 1)]:
        box, colour = box_of(heat_map, row, column, step * 3.0 / 8)
        y, x = top + row * height, left + column * width
        assert box == [y, y + height - 2, x, x + width - 2]
        assert colour == rgb(sequential()[step])


def test_darker_is_more_also_in_grey() -> None:
    heat_map = a_map(1, 9, highest=1.0)
    order = heat_map.shades(np.linspace(0, 1, 9)[None])[0]
    assert order.tolist() == list(range(9))
    light = [luminance(sequential()[step]) for step in order]
    assert light == sorted(light, reverse=True) and light[0] > 0.9 and light[-1] < 0.06


def test_what_is_beyond_the_scale_is_darkest_and_nan_is_white() -> None:
    shades = a_map(1, 4).shades(np.array([[np.nan, 0.0, 3.0, 50.0]]))
    assert shades.tolist() == [[-1, 0, 8, 8]]
    (top, bottom, left, right), _ = box_of(a_map(1, 2), 0, 1, 2.0)
    picture = drawn(a_map(1, 2), np.array([[2.0, np.nan]]))
    assert (picture[top : bottom + 1, left : right + 1] == 255).all(), "nothing is written into it either"


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (60, 256), (128, 4)])
def test_pictures_of_any_size_are_made_and_stay_of_a_size_to_look_at(rows: int, columns: int) -> None:
    height, width, _ = drawn(a_map(rows, columns), np.ones((rows, columns))).shape
    assert 300 < width < 2000 and 100 < height < 1400
