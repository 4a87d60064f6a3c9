"""TilePixels: tiles or frames as bytes, made float32 where they are read.

Rescaling and normalising map each 8-bit value to one float32, so the bytes hold all that the floats
do in a quarter of the memory. Requests wait with them, and conversations keep them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array

Normalize = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]
"""``normalize(pixels, out)``: uint8 (T, T, 3) to float32 (3, T, T)."""


class TilePixels:
    """Reads like a float32 array (n, 3, T, T); each reading makes a new one.

    Args:
        pixels: uint8 (n, T, T, 3).
        normalize: makes the values that the model reads.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, pixels: NDArray[np.uint8], normalize: Normalize) -> None:
        self._pixels = pixels
        self._normalize = normalize

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the float32 array."""
        count, height, width, channels = self._pixels.shape
        return count, channels, height, width

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._pixels.nbytes

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Of each tile; see ``digest_tiles``. Computed once."""
        return digest_tiles(self._pixels)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        """As of an array; only the tiles that the first index names are made."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, (int, np.integer)):
            one: NDArray[np.float32] = self._floats(self._pixels[first][None])[0]
            return one[tuple(rest)] if rest else one
        made = self._floats(self._pixels[first])
        return made[(slice(None), *rest)] if rest else made

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("tiles are stored as bytes; their floats are always a new array")
        made = self._floats(self._pixels)
        return made if dtype is None else made.astype(dtype, copy=False)

    def keep(self, count: int) -> TilePixels:
        """The first tiles, without the memory of the others."""
        kept = TilePixels(self._pixels[:count].copy(), self._normalize)
        # Of a few tiles the digests are those that were computed.
        kept.__dict__["digests"] = self.digests[:count]
        return kept

    def _floats(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        count, height, width, channels = pixels.shape
        made = allocate((count, channels, height, width), np.float32, "pixels of tiles")
        for tile, out in zip(pixels, made, strict=True):
            self._normalize(tile, out)
        return made


Pixels: TypeAlias = "NDArray[np.float32] | TilePixels"
"""float32 (n, 3, T, T), or what reads like it."""


def digest_tiles(tiles: Iterable[Array]) -> tuple[bytes, ...]:
    """SHA-256 of each tile's values: equal digests mean equal tiles.

    A digest that can be forged would let one picture pass for another, hence no quick checksum;
    processors with instructions for SHA-256 take less than half of BLAKE2b's time.
    """
    return tuple(hashlib.sha256(np.ascontiguousarray(tile).data).digest() for tile in tiles)


def digests_of(pixels: Pixels) -> tuple[bytes, ...]:
    """Digests of tiles or frames, computed anew only of plain arrays."""
    return pixels.digests if isinstance(pixels, TilePixels) else digest_tiles(pixels)
