"""PreparedImage: an image that is opened and cut, told from others by the content of its tiles."""

from __future__ import annotations

from dataclasses import dataclass

from llava_edge.profiles.models.anyres import AnyRes, TileLayout
from llava_edge.runtime.processing.tile_pixels import Pixels, TilePixels


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Tiles of one image.

    Attributes:
        layout: where they lie and which of their features are kept.
        pixel_values: float32 (num_tiles, 3, T, T), the thumbnail first.
        tile_digests: of each tile; see ``digests_of``.
        notes: see ``OpenedImage``.
    """

    layout: TileLayout
    pixel_values: Pixels
    tile_digests: tuple[bytes, ...]
    notes: tuple[str, ...] = ()

    def thumbnail(self, base: AnyRes) -> PreparedImage:
        """The same image on the grid ``base``: its first tile; cut, no other grid is left."""
        layout = base.layout(self.layout.image_height, self.layout.image_width)
        pixels = self.pixel_values
        first = pixels.keep(1) if isinstance(pixels, TilePixels) else pixels[:1]
        return PreparedImage(layout, first, self.tile_digests[:1], self.notes)
