"""Pictures of rectangles, triangles, lines and labels, drawn as SVG in a page and as PNG.

Colours are names: ``ink``, ``muted``, ``grid``, ``bar``, ``plus``, ``minus``, ``s0`` to ``s8`` (loads), ``d0`` to
``d8`` (differences), and ``on-s0`` to ``on-d8`` for text on such a shade. The page gives them their
colours, by its scheme.
"""

import html
from dataclasses import dataclass, field

from adamoe_dist.colours import diverging, sequential, text_on

FONT_SIZE = 13
CHARACTER_WIDTH = 7.2
_UNSEEN = (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # they would turn what follows them on the page
_REPLACED = dict.fromkeys(_UNSEEN, "\ufffd") | {code: f"<U+{code:04X}>" for code in _REORDERING}


@dataclass(frozen=True)
class Rectangle:
    """A filled rectangle; ``tip`` is shown on hovering."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str
    is_dashed: bool = False


@dataclass(frozen=True)
class Corner:
    """A filled triangle in the upper right corner that ends at ``x`` and ``y``, with sides of ``size``."""

    x: float
    y: float
    size: float
    colour: str


@dataclass(frozen=True)
class Label:
    """A line of text; ``anchor`` is start, middle or end, ``y`` its base line."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    colour: str = "ink"
    is_bold: bool = False
    is_upright: bool = False


Shape = Rectangle | Line | Corner | Label


@dataclass
class Drawing:
    """A picture.

    Attributes:
        title: what it shows, for those who do not see it.
        width: in CSS pixels.
        height: in CSS pixels.
        shapes: from back to front.
    """

    title: str
    width: float
    height: float
    shapes: list[Shape] = field(default_factory=list)


def palette(is_dark: bool = False) -> dict[str, str]:
    """Return the colour of each name."""
    plain = {
        False: ("#1a1a1a", "#595959", "#d0d0d0", "#ffffff", "#f3f3f3"),
        True: ("#ececec", "#b0b0b0", "#4a4a4a", "#16181b", "#22252a"),
    }
    colours = dict(zip(("ink", "muted", "grid", "page", "panel"), plain[is_dark], strict=True))
    for letter, shades in (("s", sequential(is_dark)), ("d", diverging(is_dark))):
        for step, shade in enumerate(shades):
            colours[f"{letter}{step}"] = shade
            colours[f"on-{letter}{step}"] = text_on(shade)
    return colours | {"bar": colours["s5"], "minus": colours["d1"], "plus": colours["d7"]}


def escaped(text: str) -> str:
    """Return text as it may stand in HTML, in an attribute too.

    Characters that no page may have are U+FFFD in it, and those that would reorder it are written as ``<U+202E>``.
    """
    return html.escape(text.translate(_REPLACED), quote=True)


def shown(text: str) -> str:
    """Return a token as it is shown in a list: its white space as signs."""
    signs = text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u2192").replace("\r", "\u240d")
    return signs.translate(_REPLACED) or "(none)"


def to_svg(drawing: Drawing) -> str:
    """Return the picture as an element of an HTML page, whose style sheet has its colours as classes."""
    body = "".join(_svg_shape(shape) for shape in drawing.shapes)
    size = f'width="{drawing.width:g}" height="{drawing.height:g}" viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    title = escaped(drawing.title)
    return f'<svg role="img" aria-label="{title}" {size}><title>{title}</title>{body}</svg>'


def _svg_shape(shape: Shape) -> str:
    if isinstance(shape, Rectangle):
        tip = f"<title>{escaped(shape.tip)}</title>" if shape.tip else ""
        place = f'x="{shape.x:g}" y="{shape.y:g}" width="{shape.width:g}" height="{shape.height:g}"'
        return f'<rect {place} class="{shape.colour}">{tip}</rect>'
    if isinstance(shape, Line):
        dash = ' stroke-dasharray="3 3"' if shape.is_dashed else ""
        place = f'x1="{shape.x1:g}" y1="{shape.y1:g}" x2="{shape.x2:g}" y2="{shape.y2:g}"'
        return f'<line {place} class="line-{shape.colour}"{dash}/>'
    if isinstance(shape, Corner):
        x, y, size = shape.x, shape.y, shape.size
        return f'<path d="M{x - size:g} {y:g}H{x:g}V{y + size:g}Z" class="{shape.colour}"/>'
    turn = f' transform="rotate(-90 {shape.x:g} {shape.y:g})"' if shape.is_upright else ""
    bold = ' font-weight="bold"' if shape.is_bold else ""
    return (
        f'<text x="{shape.x:g}" y="{shape.y:g}" text-anchor="{shape.anchor}" class="{shape.colour}"{bold}{turn}>'
        f"{escaped(shape.text)}</text>"
    )
