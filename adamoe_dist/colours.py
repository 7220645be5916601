"""Colours that can be read in grey and by the colour-blind.

Loads go from light to dark in one hue, differences from blue over white to orange; text on a shade is black or white,
whichever stands out more. Colours are mixed in Oklab (B. Ottosson, 2020), whose lightness is that which is seen.
"""

import math

LEVELS = 9
_BLUE, _ORANGE = 255.0, 55.0  # hues in degrees
Rgb = tuple[int, int, int]


def sequential(is_dark: bool = False) -> list[str]:
    """Return 9 shades of blue, each farther from the page's background than the one before."""
    if is_dark:
        return [_hex(0.24 + 0.66 * step / 8, 0.03 + 0.1 * _hump(step / 8), _BLUE) for step in range(LEVELS)]
    return [_hex(0.97 - 0.65 * step / 8, 0.01 + 0.15 * _hump(step / 8), _BLUE) for step in range(LEVELS)]


def diverging(is_dark: bool = False) -> list[str]:
    """Return 9 shades from blue (the most negative) over the background to orange; both ends are as strong."""
    shades = []
    for step in range(-4, 5):
        strength = abs(step) / 4
        lightness = 0.24 + 0.5 * strength if is_dark else 0.97 - 0.3 * strength
        shades.append(_hex(lightness, 0.005 + 0.155 * strength, _BLUE if step < 0 else _ORANGE))
    return shades


def text_on(shade: str) -> str:
    """Return black or white, whichever has more contrast with ``shade``; it is 4.58 or more on any colour."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, shade))


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it, 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2 of a colour ``#rrggbb``, 0 to 1."""
    red, green, blue = (_to_linear(channel / 255) for channel in rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def rgb(colour: str) -> Rgb:
    """Return the channels of a colour ``#rrggbb``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _hump(x: float) -> float:
    """Rise from 0 to 1 and fall to 0.6: very light colours have little chroma, dark ones more."""
    return math.sin(0.8 * math.pi * x)


def _to_linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _from_linear(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """Return a colour from Oklab's lightness, chroma and hue; chroma is lowered until the screen has the colour."""
    while True:
        linear = _linear_rgb(lightness, chroma, hue)
        if all(-1e-4 <= channel <= 1.0001 for channel in linear) or chroma <= 0.0:
            channels = [round(255 * _from_linear(min(max(channel, 0.0), 1.0))) for channel in linear]
            return "#" + "".join(f"{channel:02x}" for channel in channels)
        chroma = max(chroma - 0.002, 0.0)


def _linear_rgb(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
