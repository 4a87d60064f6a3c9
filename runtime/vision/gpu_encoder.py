"""GpuEncoder: tiles go through a tower a few at a time, and their features stay on the device.

What one batch runs on is left to who inherits: a TensorRT engine or ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Buffer, Place
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.gpu_features import GpuFeatures


class GpuEncoder(ABC):
    """Tower and projector whose features stay on the device.

    Args:
        cuda: its stream carries copies.
        tiles_per_batch: tiles computed at once.
        feature_shape: (patches, hidden) of one tile.
        place: where pixels go; None for the GPU of ``cuda``.

    Attributes:
        tiles_per_batch: as given, unless memory does not suffice for so many.
    """

    def __init__(
        self,
        cuda: CudaRuntime,
        tiles_per_batch: int,
        feature_shape: tuple[int, int],
        place: Place | None = None,
    ) -> None:
        self._cuda = cuda
        self.tiles_per_batch = tiles_per_batch
        self._feature_shape = feature_shape
        self._place: Place = place or ("cuda", cuda.index)

    def new_rows(self, shape: tuple[int, int]) -> GpuFeatures:
        """A matrix (rows, hidden) for features."""
        return GpuFeatures(shape, self._cuda)

    def encode_rows(self, pixel_values: Array, rows: GpuFeatures, first_row: int) -> None:
        """Write the features of all tiles.

        Args:
            pixel_values: float32 (num_tiles, 3, T, T).
            rows: where features go, tile after tile.
            first_row: row of the first tile's first patch.

        Raises:
            EngineError: what runs the tower, or CUDA, failed.
        """
        for start in range(0, len(pixel_values), self.tiles_per_batch):
            tiles = pixel_values[start : start + self.tiles_per_batch].astype(np.float16)
            pixels = Buffer.holding(tiles, *self._place)
            self._encode_batch(pixels, rows.address(first_row + start * self._feature_shape[0]))

    @abstractmethod
    def _encode_batch(self, pixels: Buffer, target: int) -> None:
        """Features of float16 (n, 3, T, T) to the address ``target``, done when it returns."""
