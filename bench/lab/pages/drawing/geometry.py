"""Geometry: tiles of 84 pixels, patches of 14, the released candidates scaled, and page sizes."""

from __future__ import annotations

from functools import cache

from llava_edge.profiles.models.anyres import AnyRes, TileLayout, grid_pinpoints
from llava_edge.runtime.artifact.manifest import ImageProcessing

TILE_SIZE = 84
PATCH_SIZE = 14
PATCHES = (TILE_SIZE // PATCH_SIZE) ** 2
"""Of one tile."""

PROCESSING = ImageProcessing(
    tile_size=TILE_SIZE,
    patch_size=PATCH_SIZE,
    image_grid_pinpoints=grid_pinpoints("2x2", TILE_SIZE),
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    rescale_factor=1 / 255,
)
ANYRES = AnyRes(TILE_SIZE, PATCH_SIZE, PROCESSING.image_grid_pinpoints)

PAGE_SIZES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((12, 12), (10, 12), (8, 12), (12, 10), (12, 8)),
    ((6, 12), (6, 10), (6, 8), (4, 12)),
    ((12, 6), (10, 6), (8, 6)),
    ((18, 6), (16, 6), (14, 6)),
    ((6, 18), (6, 16), (6, 14), (4, 18)),
)
"""(rows, columns) of cells that a page may have, by grid: 2x2, 1x2, 2x1, 3x1, 1x3."""

_CELL_PIXELS = (12, 14, 16, 18, 21, 24, 28)


def layout(rows: int, columns: int, cell_pixels: int) -> TileLayout:
    """AnyRes layout of a picture with that many cells of that many pixels."""
    return ANYRES.layout(rows * cell_pixels, columns * cell_pixels)


@cache
def cell_sizes(rows: int, columns: int) -> tuple[int, ...]:
    """Pixels that a cell may have in a picture so that AnyRes makes one patch of each cell.

    Other sizes would get another grid, or cells cut by the borders of patches.
    """
    found: list[int] = []
    for pixels in _CELL_PIXELS:
        cut = layout(rows, columns, pixels)
        resized = (cut.resized_height, cut.resized_width)
        kept = (cut.kept_rows, cut.kept_columns)
        if resized == (rows * PATCH_SIZE, columns * PATCH_SIZE) and kept == (rows, columns):
            found.append(pixels)
    return tuple(found)
