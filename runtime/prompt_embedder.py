"""PromptEmbedder: a request becomes what the decoder reads.

Tiles go through tower and projector into one matrix of features, with the newline row behind them;
``PromptEmbeddings`` then hands out rows of it and of the embedding table, position by position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from llava_edge.profiles.buffers import image_feature_shape
from llava_edge.profiles.model_dims import ModelDims
from llava_edge.runtime.embeddings import EmbeddingTable
from llava_edge.runtime.progress import ReportProgress, no_progress
from llava_edge.runtime.prompt_embeddings import PromptEmbeddings
from llava_edge.runtime.request import Request
from llava_edge.runtime.session import Array


class TileEncoder(Protocol):
    """Tower and projector."""

    def encode(self, pixel_values: Array, out: Array) -> None:
        """Tiles float32 (n, 3, T, T) to features (n, patches, hidden), written into ``out``."""


class PromptEmbedder:
    """Everything before the decoder, behind pixels and ids.

    Args:
        dims: model dimensions.
        image_token_id: the id that marks image positions.
        table: the embedding table.
        encoder: tower and projector; not asked where a request has no image.
        dtype: float32 (cpu flavour) or float16 (cuda flavour) of features and embeddings.
        batch_tiles: most tiles that the encoder is given at once, of one image or of several; None
            for all of an image.
    """

    def __init__(
        self,
        dims: ModelDims,
        image_token_id: int,
        table: EmbeddingTable,
        encoder: TileEncoder,
        dtype: type[np.float32] | type[np.float16],
        batch_tiles: int | None = None,
    ) -> None:
        self._dims = dims
        self._image_token_id = image_token_id
        self._table = table
        self._encoder = encoder
        self._dtype = dtype
        self._batch_tiles = batch_tiles

    def features(
        self, pixel_values: Sequence[Array], progress: ReportProgress = no_progress
    ) -> Array:
        """Features of all tiles of all images.

        Args:
            pixel_values: tiles of each image, float32 (num_tiles, 3, T, T).
            progress: told about tiles, batch by batch.

        Returns:
            (total tiles · patches + 1, hidden) in the flavour's type; the newline row is last.
        """
        patches = self._dims.vision.num_patches
        total = sum(len(pixels) for pixels in pixel_values)
        features = np.empty(image_feature_shape(self._dims, total), self._dtype)
        newline = self._table.image_newline
        # Only models without tiles have no newline row, and then nothing refers to it.
        features[-1] = 0 if newline is None else newline
        done = 0
        batches: Iterable[Array] = pixel_values
        if self._batch_tiles is not None:
            batches = _batches(pixel_values, self._batch_tiles)
        for pixels in batches:
            progress("tiles", done, total)
            rows = features[done * patches : (done + len(pixels)) * patches]
            self._encoder.encode(pixels, rows.reshape(len(pixels), patches, -1))
            done += len(pixels)
        if total:
            progress("tiles", total, total)
        return features

    def embed(self, request: Request, progress: ReportProgress = no_progress) -> PromptEmbeddings:
        """Encode a request's tiles; its embeddings are then fetched chunk by chunk.

        Args:
            request: with pixels.
            progress: told about tiles.
        """
        return PromptEmbeddings(
            request.ids,
            self._image_token_id,
            request.layouts,
            self._dims.vision.patches_per_side,
            self.features(request.pixel_values, progress),
            self._table,
        )


def _batches(images: Sequence[Array], size: int) -> Iterator[Array]:
    """Tiles of all images in order, ``size`` at a time; copied only where a batch spans images."""
    waiting: list[Array] = []
    count = 0
    for tiles in images:
        start = 0
        while start < len(tiles):
            part = tiles[start : start + size - count]
            waiting.append(part)
            start += len(part)
            count += len(part)
            if count == size:
                yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
