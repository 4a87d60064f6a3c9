"""TilePicture: what AnyRes makes of an image, drawn for people.

The thumbnail and the tiles as the model sees them, padding shaded, the patches that stay as tokens
framed, and how many tokens each part costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from llava_edge.profiles.models.anyres import TileLayout

_LONGEST, _SMALLEST_TILE, _LARGEST_TILE = 1120, 180, 420
"""Pixels: of the drawn canvas's longer side, and of a drawn tile's side."""
_MARGIN, _GAP, _LINE, _FONT_SIZE, _HATCH = 24, 28, 24, 16, 10
_PAPER, _INK, _FAINT = (250, 250, 248), (38, 40, 44), (112, 116, 122)
_PAD, _STRIPE = (214, 216, 220), (190, 193, 198)
_GRID, _KEPT = (255, 255, 255), (236, 112, 32)

Point = tuple[int, int]


@dataclass(frozen=True)
class TileTokens:
    """Tokens of one image by where they come from; together ``TileLayout.num_image_tokens``.

    Attributes:
        thumbnail: patches of the thumbnail.
        tiles: patches that stay of each tile, row by row.
        newlines: one behind every kept row of patches, or one behind a thumbnail alone, if any.
    """

    thumbnail: int
    tiles: tuple[int, ...]
    newlines: int

    @classmethod
    def of(cls, layout: TileLayout, patches_per_side: int) -> TileTokens:
        """Count them.

        Args:
            layout: of the image.
            patches_per_side: patches along one side of a tile.
        """
        side = patches_per_side
        rows = _kept(layout.first_row, layout.kept_rows, layout.rows, side)
        columns = _kept(layout.first_column, layout.kept_columns, layout.columns, side)
        tiles = tuple(height * width for height in rows for width in columns)
        newlines = layout.kept_rows if layout.rows else layout.num_image_tokens - side * side
        return cls(side * side, tiles, newlines)


def draw_tiles(
    image: Image.Image,
    layout: TileLayout,
    patches_per_side: int,
    title: str = "",
    middle: Image.Image | None = None,
) -> Image.Image:
    """Draw an image as it is cut.

    Args:
        image: RGB, as it was opened.
        layout: of the image on the grid that is used.
        patches_per_side: patches along one side of a tile.
        title: stands above.
        middle: all that is seen of the image, a square; None where the whole is.

    Returns:
        RGB: the thumbnail, to its right the canvas of tiles, words above and below.
    """
    tokens = TileTokens.of(layout, patches_per_side)
    side = _tile_side(layout)
    rows, columns = max(layout.rows, 1), layout.columns
    words = _words(layout, tokens, "squashed into" if middle is None else "of which the middle is")
    font = ImageFont.load_default(_FONT_SIZE)
    wide = max(round(font.getlength(line)) for line in [title, *words])
    canvas_width = columns * side + _GAP if columns else 0
    top = _MARGIN + (_LINE + 6 if title else 0)
    size = (
        2 * _MARGIN + max(side + canvas_width, wide),
        top + _LINE + rows * side + 12 + len(words) * _LINE + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 4), title, fill=_INK, font=font)
    pen.text(
        (_MARGIN, top - 2), "thumbnail" if middle is None else "middle", fill=_FAINT, font=font
    )
    corner = (_MARGIN, top + _LINE)
    sheet.paste((middle or image).resize((side, side), Image.Resampling.BICUBIC), corner)
    _frame(pen, corner, (side, side), _INK)
    _label(sheet, corner, f"{tokens.thumbnail} tokens", font)
    if columns:
        corner = (_MARGIN + side + _GAP, top + _LINE)
        pen.text((corner[0], top - 2), f"tiles, {rows} x {columns}", fill=_FAINT, font=font)
        sheet.paste(_canvas(image, layout, side, patches_per_side), corner)
        _frame(pen, corner, (columns * side, rows * side), _INK)
        for index, count in enumerate(tokens.tiles):
            row, column = divmod(index, columns)
            place = (corner[0] + column * side, corner[1] + row * side)
            _label(sheet, place, f"{index + 1}:  {count} tokens", font)
    below = top + _LINE + rows * side + 12
    for number, line in enumerate(words):
        ink = _INK if number == 0 else _FAINT
        pen.text((_MARGIN, below + number * _LINE), line, fill=ink, font=font)
    return sheet


def stacked(pictures: list[Image.Image]) -> Image.Image:
    """Drawings one below the other; at least one."""
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures)), _PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def _kept(first: int, kept: int, tiles: int, side: int) -> list[int]:
    """How many of the kept patches lie in each tile along one axis."""
    last = first + kept
    return [max(0, min(last, (i + 1) * side) - max(first, i * side)) for i in range(tiles)]


def _tile_side(layout: TileLayout) -> int:
    across = max(layout.rows, layout.columns, 1)
    return max(_SMALLEST_TILE, min(_LARGEST_TILE, _LONGEST // across))


def _words(layout: TileLayout, tokens: TileTokens, only_tile: str) -> list[str]:
    counts = [f"{tokens.thumbnail} thumbnail"]
    if layout.rows:
        counts.append(f"{sum(tokens.tiles)} tiles")
    if layout.rows or tokens.newlines:
        counts.append(f"{tokens.newlines} newlines" if layout.rows else "1 newline")
    words = [f"{layout.num_image_tokens} tokens = {' + '.join(counts)}"]
    size = f"{layout.image_width} x {layout.image_height} pixels"
    if not layout.rows:
        return [*words, f"{size}, {only_tile} one tile"]
    padding = layout.pad_left + layout.pad_right + layout.pad_top + layout.pad_bottom
    words.append(f"{size}, resized to {layout.resized_width} x {layout.resized_height}")
    if not tokens.newlines:
        words.append("shaded: padding;  so thin a picture keeps no patch of its tiles")
    elif padding:
        words.append("shaded: padding;  framed: patches that are kept, the others are cut off")
    return words


def _canvas(image: Image.Image, layout: TileLayout, side: int, patches: int) -> Image.Image:
    """Tiles put together, drawn ``side`` pixels each: image, shaded padding, kept patches, grid."""
    width, height = layout.columns * side, layout.rows * side
    canvas = Image.new("RGB", (width, height), _PAD)
    pen = ImageDraw.Draw(canvas)
    for offset in range(-height, width, _HATCH):
        pen.line((offset, height, offset + height, 0), fill=_STRIPE, width=2)
    # From model pixels to drawn ones, by the size of the whole canvas.
    full_width = layout.pad_left + layout.resized_width + layout.pad_right
    full_height = layout.pad_top + layout.resized_height + layout.pad_bottom
    left = round(layout.pad_left * width / full_width)
    top = round(layout.pad_top * height / full_height)
    shown = (
        max(1, round(layout.resized_width * width / full_width)),
        max(1, round(layout.resized_height * height / full_height)),
    )
    canvas.paste(image.resize(shown, Image.Resampling.BICUBIC), (left, top))
    lines = [(0, row * side, width, row * side) for row in range(1, layout.rows)]
    lines += [(column * side, 0, column * side, height) for column in range(1, layout.columns)]
    # Dark within light, so that a line shows on any picture.
    for ink, thickness in ((_GRID, 5), (_INK, 1)):
        for line in lines:
            pen.line(line, fill=ink, width=thickness)
    if layout.kept_rows and layout.kept_columns:
        scale = side / patches
        box = (
            round(layout.first_column * scale),
            round(layout.first_row * scale),
            round((layout.first_column + layout.kept_columns) * scale) - 1,
            round((layout.first_row + layout.kept_rows) * scale) - 1,
        )
        pen.rectangle(box, outline=_KEPT, width=3)
    return canvas


def _frame(pen: ImageDraw.ImageDraw, corner: Point, size: Point, ink: tuple[int, ...]) -> None:
    (left, top), (width, height) = corner, size
    pen.rectangle((left - 1, top - 1, left + width, top + height), outline=ink)


def _label(
    sheet: Image.Image,
    corner: Point,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Light words on a dark, translucent patch in a tile's corner, readable on any picture."""
    left, top, right, bottom = font.getbbox(text)
    width, height = round(right - left) + 16, round(bottom - top) + 12
    place = (corner[0] + 8, corner[1] + 8)
    patch = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(patch)
    pen.rounded_rectangle((0, 0, width - 1, height - 1), 6, fill=(20, 22, 26, 190))
    pen.text((8 - left, 6 - top), text, fill=(255, 255, 255, 255), font=font)
    sheet.paste(patch, place, patch)
