"""PromptEmbedder: a request becomes what the decoder reads.

Tiles and frames go through tower and projector into one matrix of features, the newline row behind;
``PromptEmbeddings`` then hands out rows of it and of the embedding table, position by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llava_edge.profiles.memory.buffers import image_feature_shape, video_tokens_per_frame
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.processing.tile_pixels import Pixels, digests_of
from llava_edge.runtime.util.allocation import allocate
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.progress import Progress, no_progress
from llava_edge.runtime.vision.encoder_protocols import CachingEncoder, DeviceEncoder, TileEncoder
from llava_edge.runtime.vision.gpu_features import GpuFeatures


class PromptEmbedder:
    """Everything before the decoder, behind pixels and ids.

    Args:
        dims: model dimensions.
        image_token_id: the id that marks image positions.
        table: the embedding table.
        encoder: tower and projector; not asked where a request has no image.
        dtype: float32 (cpu target) or float16 (cuda target) of features and embeddings.
        batch_tiles: most tiles that the encoder is given at once, of one image or of several; None
            for all of an image.
        video_token_id: the id that marks video positions; None for a model without.
    """

    def __init__(
        self,
        dims: ModelDims,
        image_token_id: int,
        table: EmbeddingTable,
        encoder: TileEncoder | DeviceEncoder,
        dtype: type[np.float32] | type[np.float16],
        batch_tiles: int | None = None,
        video_token_id: int | None = None,
    ) -> None:
        self._dims = dims
        self._image_token_id = image_token_id
        self._table = table
        self._encoder = encoder
        self._dtype = dtype
        self._batch_tiles = batch_tiles
        self._video_token_id = video_token_id

    def num_to_encode(self, request: Request) -> int:
        """Tiles and frames of a request, with pixels, that ``embed`` would not find encoded."""
        if not isinstance(self._encoder, CachingEncoder):
            return request.num_tiles
        vision = self._dims.vision
        rows = {True: video_tokens_per_frame(vision), False: vision.num_patches}
        digests: dict[bool, set[bytes]] = {True: set(), False: set()}
        for medium in request.media:
            digests[medium.layout is None].update(medium.digests)
        return sum(self._encoder.num_missing(digests[kind], rows[kind]) for kind in rows)

    def forget(self) -> None:
        """Let no later request reuse features that were computed so far."""
        if isinstance(self._encoder, CachingEncoder):
            self._encoder.forget()

    def features(
        self,
        pixel_values: Sequence[Pixels],
        progress: Progress = no_progress,
        frame_pixels: Sequence[Pixels] = (),
    ) -> Array | GpuFeatures:
        """Features of all tiles of all images, and of all frames of all videos.

        Args:
            pixel_values: tiles of each image, float32 (num_tiles, 3, T, T).
            progress: told about tiles and frames, batch by batch.
            frame_pixels: frames of each video, float32 (num_frames, 3, T, T).

        Returns:
            (total tiles · patches + frames · tokens of one + 1, hidden) in the target's type; the
            newline row is last. Where the encoder keeps them on the device, they are there.
        """
        patches = self._dims.vision.num_patches
        total = sum(len(pixels) for pixels in pixel_values)
        frames = sum(len(pixels) for pixels in frame_pixels)
        features, encode = self._room(image_feature_shape(self._dims, total, frames))
        done = 0
        for pixels, digests in self._batches(pixel_values):
            progress("tiles", done, total)
            encode(pixels, digests, done * patches)
            done += len(pixels)
        if total:
            progress("tiles", total, total)
        if frames:
            self._encode_frames(frame_pixels, features, total * patches, progress)
        return features

    def _encode_frames(
        self,
        frame_pixels: Sequence[Pixels],
        features: Array | GpuFeatures,
        first: int,
        progress: Progress,
    ) -> None:
        """Write pooled features of all frames from row ``first`` on."""
        # No engine is built for the tower of a video model.
        assert isinstance(features, np.ndarray)
        assert not isinstance(self._encoder, DeviceEncoder)
        rows = video_tokens_per_frame(self._dims.vision)
        done, total = 0, sum(len(pixels) for pixels in frame_pixels)
        for frames, digests in self._batches(frame_pixels):
            progress("frames", done, total)
            out = features[first + done * rows :][: len(frames) * rows]
            self._encode(frames, digests, out.reshape(len(frames), rows, -1))
            done += len(frames)
        progress("frames", total, total)

    def _encode(self, pixels: Array, digests: tuple[bytes, ...], out: Array) -> None:
        assert not isinstance(self._encoder, DeviceEncoder)
        if isinstance(self._encoder, CachingEncoder):
            self._encoder.encode(pixels, out, digests)
        else:
            self._encoder.encode(pixels, out)

    def _batches(self, media: Sequence[Pixels]) -> Iterator[tuple[Array, tuple[bytes, ...]]]:
        """Pixels as float32, batch by batch, with their digests where the encoder asks for them."""
        known = isinstance(self._encoder, CachingEncoder)
        for parts in _batches(media, self._batch_tiles):
            pixels = [media[index][part] for index, part in parts]
            digests = [digests_of(media[index])[part] for index, part in parts] if known else []
            yield pixels[0] if len(pixels) == 1 else np.concatenate(pixels), sum(digests, ())

    def _room(
        self, shape: tuple[int, int]
    ) -> tuple[Array | GpuFeatures, Callable[[Array, tuple[bytes, ...], int], None]]:
        """A matrix that ends with the newline row, and what writes tiles into it from a row on."""
        # Only models without tiles have no newline row, and then nothing refers to it.
        newline = self._table.image_newline
        last = np.zeros(shape[1], self._dtype) if newline is None else newline
        encoder, patches = self._encoder, self._dims.vision.num_patches
        if isinstance(encoder, DeviceEncoder):
            rows = encoder.new_rows(shape)
            rows.write(shape[0] - 1, last)
            return rows, lambda pixels, _, first: encoder.encode_rows(pixels, rows, first)
        features = allocate(shape, self._dtype, "features of the request's tiles")
        features[-1] = last

        def encode(pixels: Array, digests: tuple[bytes, ...], first: int) -> None:
            out = features[first : first + len(pixels) * patches]
            self._encode(pixels, digests, out.reshape(len(pixels), patches, -1))

        return features, encode

    def embed(self, request: Request, progress: Progress = no_progress) -> PromptEmbeddings:
        """Encode a request's tiles and frames; its embeddings are then fetched chunk by chunk.

        Args:
            request: with pixels.
            progress: told about tiles and frames.
        """
        return PromptEmbeddings(
            request.ids,
            self._image_token_id,
            request.layouts,
            self._dims.vision.patches_per_side,
            self.features(request.pixel_values, progress, request.frame_pixels),
            self._table,
            self._video_token_id,
        )


def _batches(media: Sequence[Pixels], size: int | None) -> Iterator[list[tuple[int, slice]]]:
    """Which tiles (or frames) of which media make each batch, in order.

    Args:
        media: tiles of images, or frames of videos.
        size: of a batch; None for one batch a medium.
    """
    parts: list[tuple[int, slice]] = []
    count = 0
    for index, tiles in enumerate(media):
        start, most = 0, len(tiles) if size is None else size
        while start < len(tiles):
            stop = min(len(tiles), start + most - count)
            parts.append((index, slice(start, stop)))
            count += stop - start
            start = stop
            if count == most:
                yield parts
                parts, count = [], 0
    if parts:
        yield parts
