"""Rendering: a page becomes a picture, drawn with Pillow's own font."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_edge.bench.lab.pages.drawing.page import BAR, COLOURS, SHAPES, Page

_OVERSAMPLING = 4
_FONT_SHARE = 0.8
"""Font size over cell side: capitals are then about 8 pixels high on a tile, at most 4 of them on
the thumbnail of four tiles."""


def render(page: Page, cell_pixels: int, generator: np.random.Generator) -> Image.Image:
    """Draw a page.

    Args:
        page: what stands where.
        cell_pixels: side of a cell in the picture.
        generator: for paper, ink and how far a sign is off the middle of its cell.

    Returns:
        RGB, ``page.columns * cell_pixels`` wide and ``page.rows * cell_pixels`` high.
    """
    height, width = page.rows * cell_pixels, page.columns * cell_pixels
    picture = _paper(generator, height, width)
    reach = cell_pixels // 12
    shifts = generator.integers(-reach, reach + 1, (len(page.marks), 2)).tolist()
    tones = generator.integers(-18, 19, (len(page.marks), 3)).tolist()
    for ((row, column), mark), (down, right), tone in zip(
        page.marks.items(), shifts, tones, strict=True
    ):
        if mark.sign == BAR:
            # Cells of a bar belong together: one colour, no gap between them.
            down = right = 0
            tone = (0, 0, 0)
        ink = tuple(
            min(255, max(0, part + off))
            for part, off in zip(COLOURS[mark.colour], tone, strict=True)
        )
        at = (column * cell_pixels + right, row * cell_pixels + down)
        picture.paste(ink, at, _mask(mark.sign, cell_pixels))
    return picture


def _paper(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Paper that is not quite white nor quite even."""
    tint = generator.integers(222, 250, 3)
    grain = generator.integers(0, 7, (height, width, 1))
    return Image.fromarray((tint + grain).astype(np.uint8))


@cache
def _mask(sign: str, side: int) -> Image.Image:
    """Ink of a sign in its cell, 8-bit, (side, side)."""
    if len(sign) == 1:
        mask = Image.new("L", (side, side))
        font = ImageFont.load_default(side * _FONT_SHARE)
        left, _, right, _ = map(round, font.getbbox(sign))
        _, top, _, bottom = map(round, font.getbbox("H"))
        # Whole pixels: between them, Pillow cuts the topmost row of some glyphs off.
        at = ((side - left - right) // 2, (side - top - bottom) // 2)
        ImageDraw.Draw(mask).text(at, sign, fill=255, font=font)
        return mask
    large = side * _OVERSAMPLING
    mask = Image.new("L", (large, large))
    pen = ImageDraw.Draw(mask)
    low, high = large * 0.12, large * 0.88
    if sign == BAR:
        pen.rectangle((low, 0, high, large), fill=255)
    elif sign == SHAPES[0]:
        pen.rectangle((low, low, high, high), fill=255)
    elif sign == SHAPES[1]:
        pen.ellipse((low, low, high, high), fill=255)
    else:
        pen.polygon([(low, high), (high, high), (large / 2, low)], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)
