"""PreparedImage: an image that is opened and cut, told from others by the content of its tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llava_edge.profiles.anyres import AnyRes, TileLayout
from llava_edge.runtime.session import Array


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Tiles of one image.

    Attributes:
        layout: where they lie and which of their features are kept.
        pixel_values: float32 (num_tiles, 3, T, T), the thumbnail first.
        tile_digests: of each tile; see ``digest_tiles``.
        notes: see ``OpenedImage``.
    """

    layout: TileLayout
    pixel_values: Array
    tile_digests: tuple[bytes, ...]
    notes: tuple[str, ...] = ()

    def thumbnail(self, base: AnyRes) -> PreparedImage:
        """The same image on the grid ``base``: its first tile; cut, no other grid is left."""
        layout = base.layout(self.layout.image_height, self.layout.image_width)
        return PreparedImage(layout, self.pixel_values[:1], self.tile_digests[:1], self.notes)


def digest_tiles(pixel_values: Iterable[Array]) -> tuple[bytes, ...]:
    """SHA-256 of each tile's values: equal digests mean equal tiles.

    A digest that can be forged would let one picture pass for another, hence no quick checksum;
    processors with instructions for SHA-256 take less than half of BLAKE2b's time.
    """
    return tuple(hashlib.sha256(np.ascontiguousarray(tile).data).digest() for tile in pixel_values)
