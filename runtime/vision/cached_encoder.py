"""CachedEncoder: tiles that were encoded before are not encoded again.

A camera's next frame often differs in a corner: AnyRes then gives the same tiles but for that
corner and the thumbnail, and only those go through the tower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from llava_edge.profiles.errors import EngineError, RequestError
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.processing.tile_pixels import digest_tiles
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.encoder_protocols import DeviceEncoder, TileEncoder
from llava_edge.runtime.vision.feature_cache import FeatureCache, FeatureKey


class CachedEncoder:
    """A tile encoder with its features kept in host memory, those of a video's frames as well.

    The features are those of the encoder, bit for bit, where it encodes tiles one at a time, as on
    the CPU. On a GPU tiles share a batch, which is smaller without those that are known, and
    kernels may round by its size.

    Args:
        encoder: asked for what is not known.
        cache: of features of one tile or frame, (patches or pooled patches, hidden).
    """

    def __init__(self, encoder: TileEncoder, cache: FeatureCache) -> None:
        self._encoder = encoder
        self._cache = cache

    def encode(
        self, pixel_values: Array, out: Array, digests: Sequence[bytes] | None = None
    ) -> None:
        """Tiles float32 (n, 3, T, T) to features (n, patches, hidden), or frames to pooled ones.

        Args:
            pixel_values: tiles or frames.
            out: for their features.
            digests: of each of them, always of the same form; computed here if left out.
        """
        rows = out.shape[1]
        found_by = digest_tiles(pixel_values) if digests is None else digests
        keys = [(digest, rows) for digest in found_by]
        unknown: dict[FeatureKey, int] = {}
        for index, key in enumerate(keys):
            found = self._cache.find(key)
            if found is None:
                unknown.setdefault(key, index)
            else:
                out[index] = found
        self._encode(pixel_values, list(unknown.values()), out)
        for index, key in enumerate(keys):
            first = unknown.get(key)
            if first == index:
                self._cache.keep(key, out[index])
            elif first is not None:
                # The same tile twice in one batch, as of a plain background.
                out[index] = out[first]

    def num_missing(self, digests: Iterable[bytes], rows: int) -> int:
        """How many of these tiles or frames ``encode`` would have to encode now.

        Args:
            digests: each but once; see ``digest_tiles``.
            rows: of the features of one: patches, or pooled patches.
        """
        return sum((digest, rows) not in self._cache for digest in digests)

    def forget(self) -> None:
        """Let all features go."""
        self._cache.clear()

    def _encode(self, pixel_values: Array, indices: list[int], out: Array) -> None:
        if len(indices) == len(pixel_values):
            self._encoder.encode(pixel_values, out)
        elif indices:
            features = allocate(
                (len(indices), *out.shape[1:]), out.dtype, "features of tiles not seen before"
            )
            self._encoder.encode(pixel_values[indices], features)
            out[indices] = features


def cached_encoder(
    encoder: TileEncoder | DeviceEncoder,
    dims: ModelDims,
    dtype: type[np.float32] | type[np.float16],
    cache_bytes: int,
) -> TileEncoder | DeviceEncoder:
    """An encoder as it is, or with a cache of so many bytes.

    Raises:
        RequestError: the cache would not hold one tile.
        EngineError: the encoder's features stay on the device.
    """
    if not cache_bytes:
        return encoder
    tile_bytes = dims.vision.num_patches * dims.text.hidden_size * np.dtype(dtype).itemsize
    if cache_bytes < tile_bytes:
        raise RequestError(
            f"a vision cache of {cache_bytes} bytes was asked; the features of one tile of this "
            f"model take {tile_bytes}. Give at least that, and a multiple of it for an image, or "
            "0 for no cache."
        )
    if isinstance(encoder, DeviceEncoder):
        raise EngineError(
            "a vision cache was asked; it lies in host memory, and the features of a TensorRT "
            "tower, or of any with features_on_device, stay on the device. Load with engine='ort' "
            "and without features_on_device, or without vision_cache_bytes."
        )
    return CachedEncoder(encoder, FeatureCache(cache_bytes))
