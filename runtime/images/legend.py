"""A strip under a picture that says what the picture shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .colormaps import colorize

_LEAST = 180  # narrower pictures get a strip of this width


def with_legend(picture: np.ndarray, lines: Sequence[str], colormap: str) -> np.ndarray:
    """The picture, uint8 (H, W, 3), over a strip with text and a colour bar from low to high; as wide as the picture,
    at least 180 pixels. The text's size follows the picture's; a line that is too long ends in three dots.
    """
    height, width = picture.shape[:2]
    wide = max(width, _LEAST)
    size = max(11, round(min(wide, 2 * height) / 30))
    font, gap = ImageFont.load_default(size=size), max(3, size // 3)
    bar = max(6, size // 2)
    strip = gap + (size + gap) * len(lines) + bar + gap + size + gap
    canvas = Image.new("RGB", (wide, height + strip), "white")
    canvas.paste(Image.fromarray(picture), ((wide - width) // 2, 0))
    draw, y = ImageDraw.Draw(canvas), height + gap
    for line in lines:
        draw.text((gap, y), _shortened(line, font, wide - 2 * gap), fill="black", font=font)
        y += size + gap
    colours = colorize(np.linspace(0, 1, wide - 2 * gap)[None], colormap)
    canvas.paste(Image.fromarray(np.repeat(colours, bar, axis=0)), (gap, y))
    y += bar + gap // 2
    draw.text((gap, y), "lowest", fill="black", font=font)
    draw.text((wide - gap, y), "highest", fill="black", font=font, anchor="ra")
    return np.asarray(canvas)


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
