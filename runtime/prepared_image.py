"""PreparedImage: an image that is opened and cut, told from others by the content of its tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llava_edge.profiles.anyres import TileLayout
from llava_edge.runtime.session import Array

_DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """Tiles of one image.

    Attributes:
        layout: where they lie and which of their features are kept.
        pixel_values: float32 (num_tiles, 3, T, T), the thumbnail first.
        tile_digests: of each tile; see ``digest_tiles``.
    """

    layout: TileLayout
    pixel_values: Array
    tile_digests: tuple[bytes, ...]


def digest_tiles(pixel_values: Iterable[Array]) -> tuple[bytes, ...]:
    """BLAKE2b, 16 bytes, of each tile's values: equal digests mean equal tiles.

    A digest that can be forged would let one picture pass for another, hence no quicker checksum.
    """
    return tuple(
        hashlib.blake2b(np.ascontiguousarray(tile).data, digest_size=_DIGEST_BYTES).digest()
        for tile in pixel_values
    )
