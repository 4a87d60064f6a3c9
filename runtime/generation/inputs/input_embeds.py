"""PromptEmbeddings: what the decoder reads at each position of a prompt.

Text positions are rows of the embedding table, image positions rows of the tile features. Both are
fetched chunk by chunk, so a prompt of any length costs one chunk and the features.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llava_edge.profiles.models.anyres import TileLayout
from llava_edge.runtime.processing.image_packing import packing_index
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.gpu_features import GpuFeatures


class Rows(Protocol):
    """Reads embedding rows."""

    def rows(self, ids: Array, *, out: Array) -> Array:
        """Write the rows of ``ids`` into ``out`` (len(ids), hidden)."""


class PromptEmbeddings:
    """Embeddings of one prompt.

    Args:
        ids: int64 (num_tokens,), each image already as many ids as it costs.
        image_token_id: the id that marks image positions.
        layouts: geometry of each image, in order of appearance.
        patches_per_side: patches along one side of a tile.
        features: (total tiles · patches + video rows + 1, hidden): the tiles of all images one
            after another, the video's frames, and the newline row last. Where they are on the
            device, ``place`` moves them there.
        table: the embedding table.
        video_token_id: the id that marks video positions; None for a model without.

    Attributes:
        index_seconds: what making this took.
        gather_seconds: what ``fill`` and ``place`` took so far.
    """

    def __init__(
        self,
        ids: Array,
        image_token_id: int,
        layouts: Sequence[TileLayout],
        patches_per_side: int,
        features: Array | GpuFeatures,
        table: Rows,
        video_token_id: int | None = None,
    ) -> None:
        started = time.perf_counter()
        self.gather_seconds = 0.0
        self._ids = ids
        self._features = features
        self._table = table
        newline_row = features.shape[0] - 1
        sources: list[Array] = []
        base = 0
        for layout in layouts:
            num_rows = layout.num_tiles * patches_per_side**2
            index = packing_index(layout, patches_per_side)
            # packing_index counts within one image; its own newline row lies behind its tiles.
            sources.append(np.where(index == num_rows, newline_row, index + base))
            base += num_rows
        self._feature_rows = np.full(ids.shape, -1, np.int64)
        if sources:
            self._feature_rows[ids == image_token_id] = np.concatenate(sources)
        if video_token_id is not None:
            # Frames have no newline: their rows follow each other as they are.
            self._feature_rows[ids == video_token_id] = np.arange(base, newline_row)
        self.index_seconds = time.perf_counter() - started

    @property
    def features(self) -> Array:
        """(rows, hidden) in host memory, copied where they are on the device."""
        features = self._features
        return features.read() if isinstance(features, GpuFeatures) else features

    @property
    def on_device(self) -> bool:
        """Whether features lie on a device, for as long as this object is there."""
        return isinstance(self._features, GpuFeatures)

    def place(self, start: int, stop: int, address: int) -> None:
        """Copy what ``fill`` left out, features on the device, to the rows at ``address``."""
        if not isinstance(self._features, GpuFeatures):
            return
        started = time.perf_counter()
        rows = self._feature_rows[start:stop]
        positions = np.flatnonzero(rows >= 0)
        self._features.place(rows[positions], positions, address)
        self.gather_seconds += time.perf_counter() - started

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Write the embeddings of positions start..stop into ``out`` (stop − start, hidden).

        Rows of images are left as they are where features are on the device.
        """
        started = time.perf_counter()
        self._fill(start, stop, out)
        self.gather_seconds += time.perf_counter() - started

    def at(self, positions: Array, dtype: Any) -> Array:
        """Embeddings at some positions, (len(positions), hidden), wherever features are."""
        out = allocate((len(positions), self._features.shape[1]), dtype, "embeddings to compare")
        for place, position in enumerate(positions.tolist()):
            self.fill(position, position + 1, out[place : place + 1])
        if isinstance(self._features, GpuFeatures):
            rows = self._feature_rows[positions]
            out[rows >= 0] = self._features.read()[rows[rows >= 0]]
        return out

    def _fill(self, start: int, stop: int, out: Array) -> None:
        rows = self._feature_rows[start:stop]
        is_image = rows >= 0
        features = None if isinstance(self._features, GpuFeatures) else self._features
        if is_image.all():
            if features is not None:
                np.take(features, rows, axis=0, out=out)
            return
        text = ~is_image
        ids = self._ids[start:stop]
        if not is_image.any():
            self._table.rows(ids, out=out)
            return
        if features is not None:
            out[is_image] = features[rows[is_image]]
        wanted = allocate((int(text.sum()), out.shape[1]), out.dtype, "embeddings of text")
        out[text] = self._table.rows(ids[text], out=wanted)
