"""Pictures as PNG files, in the light scheme."""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adamoe_dist.inspection.drawing import FONT_SIZE, Corner, Drawing, Label, Line, Rectangle, palette

SCALE = 2
MARGIN = 12
DASH = 3
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def to_png(drawing: Drawing) -> bytes:
    """Return a picture as a PNG file, at twice its size, with its title above it."""
    colours = palette()
    top = MARGIN + 2 * FONT_SIZE
    title = ImageFont.load_default(SCALE * FONT_SIZE).getlength(drawing.title) / SCALE
    width = max(drawing.width, math.ceil(title) + 1) + 2 * MARGIN
    size = (int(SCALE * width), int(SCALE * (drawing.height + top + MARGIN)))
    image = Image.new("RGB", size, colours["page"])
    canvas = _Canvas(image, colours, MARGIN, top)
    canvas.label(Label(0, FONT_SIZE - top + MARGIN, drawing.title, is_bold=True))
    for shape in drawing.shapes:
        if isinstance(shape, Rectangle):
            canvas.rectangle(shape)
        elif isinstance(shape, Line):
            canvas.line(shape)
        elif isinstance(shape, Corner):
            canvas.corner(shape)
        else:
            canvas.label(shape)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class _Canvas:
    def __init__(self, image: Image.Image, colours: dict[str, str], left: float, top: float) -> None:
        self._image, self._colours, self._left, self._top = image, colours, left, top
        self._draw = ImageDraw.Draw(image)
        self._font = ImageFont.load_default(SCALE * FONT_SIZE)

    def rectangle(self, shape: Rectangle) -> None:
        x, y = self._place(shape.x, shape.y)
        right, bottom = self._place(shape.x + shape.width, shape.y + shape.height)
        if right > x and bottom > y:
            self._draw.rectangle((x, y, right - 1, bottom - 1), fill=self._colours[shape.colour])

    def line(self, shape: Line) -> None:
        (x1, y1), (x2, y2) = self._place(shape.x1, shape.y1), self._place(shape.x2, shape.y2)
        length = math.hypot(x2 - x1, y2 - y1)
        dash = DASH * SCALE if shape.is_dashed else max(length, 1.0)
        for start in np.arange(0.0, length, 2 * dash).tolist():
            ends = [part / length for part in (start, min(start + dash, length))]
            places = [(x1 + (x2 - x1) * part, y1 + (y2 - y1) * part) for part in ends]
            self._draw.line(places, fill=self._colours[shape.colour], width=SCALE)

    def corner(self, shape: Corner) -> None:
        x, y = self._place(shape.x, shape.y)
        size = round(SCALE * shape.size)
        points = [(x - 1 - size, y), (x - 1, y), (x - 1, y + size)]
        self._draw.polygon(points, fill=self._colours[shape.colour])

    def label(self, shape: Label) -> None:
        x, y = self._place(shape.x, shape.y)
        fill = self._colours[shape.colour]
        stroke = 0.5 if shape.is_bold else 0
        if not shape.is_upright:
            anchor = _ANCHORS[shape.anchor]
            self._draw.text((x, y), shape.text, fill=fill, font=self._font, anchor=anchor, stroke_width=stroke)
            return
        width, height = int(self._font.getlength(shape.text)) + 2, 2 * SCALE * FONT_SIZE
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).text((0, height * 3 // 4), shape.text, fill=255, font=self._font, anchor="ls")
        mask = mask.rotate(90, expand=True)
        end = {"start": 0, "middle": width // 2, "end": width}[shape.anchor]
        self._image.paste(fill, (x - height * 3 // 4, y - width + end), mask)

    def _place(self, x: float, y: float) -> tuple[int, int]:
        return round(SCALE * (x + self._left)), round(SCALE * (y + self._top))
