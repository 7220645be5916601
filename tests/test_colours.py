"""Shades that are read in grey, and text that is read on them."""

import pytest

from adamoe_dist.colours import contrast, diverging, luminance, rgb, sequential, text_on
from adamoe_dist.inspection.drawing import palette


@pytest.mark.parametrize("is_dark", [False, True])
def test_loads_go_one_way_from_the_page_in_grey(is_dark):
    values = [luminance(shade) for shade in sequential(is_dark)]
    assert values == sorted(values, reverse=not is_dark)
    steps = [
        contrast(first, second) for first, second in zip(sequential(is_dark), sequential(is_dark)[1:], strict=False)
    ]
    assert min(steps) > 1.15, "neighbours can be told apart"
    page = palette(is_dark)["page"]
    assert contrast(page, sequential(is_dark)[0]) < 1.3 and contrast(page, sequential(is_dark)[8]) > 7


@pytest.mark.parametrize("is_dark", [False, True])
def test_differences_are_blue_and_orange_and_as_strong(is_dark):
    shades = diverging(is_dark)
    for step in range(4):
        low, high = rgb(shades[step]), rgb(shades[8 - step])
        assert low[2] > low[0] and high[0] > high[2]
        assert contrast(shades[step], shades[8 - step]) < 1.25, "in grey only the bar tells the sign"
    away = [contrast(shade, shades[4]) for shade in shades[4:]]
    assert away == sorted(away)


@pytest.mark.parametrize("is_dark", [False, True])
def test_text_stands_out_on_every_shade(is_dark):
    colours = palette(is_dark)
    for name, colour in colours.items():
        if f"on-{name}" in colours:
            assert contrast(colour, colours[f"on-{name}"]) >= 4.5, name
    for ground in ("page", "panel"):
        assert contrast(colours["ink"], colours[ground]) >= 7 and contrast(colours["muted"], colours[ground]) >= 4.5
    for name in ("bar", "plus", "minus"):
        assert contrast(colours[name], colours["page"]) >= 1.8, name


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert text_on("#ffff00") == "#000000" and text_on("#000080") == "#ffffff"
