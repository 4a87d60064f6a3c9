"""TensorRTEncoder: tiles to projected features by a TensorRT engine, all in device memory."""

from __future__ import annotations

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.cuda_runtime import CudaRuntime
from llava_edge.runtime.device_rows import DeviceRows
from llava_edge.runtime.session import Array, Buffer
from llava_edge.runtime.tensorrt_engine import TensorRTEngine


class TensorRTEncoder:
    """Tower and projector behind their engine.

    Args:
        engine: of this tower.
        cuda: its stream carries runs and copies.
        tile_shape: (3, T, T).
        feature_shape: (patches, hidden) of one tile.
    """

    def __init__(
        self,
        engine: TensorRTEngine,
        cuda: CudaRuntime,
        tile_shape: tuple[int, int, int],
        feature_shape: tuple[int, int],
    ) -> None:
        self._engine = engine
        self._cuda = cuda
        self._tile_shape = tile_shape
        self._feature_shape = feature_shape

    def new_rows(self, shape: tuple[int, int]) -> DeviceRows:
        """A matrix (rows, hidden) for features."""
        return DeviceRows(shape, self._cuda)

    def encode_rows(self, pixel_values: Array, rows: DeviceRows, first_row: int) -> None:
        """Write the features of all tiles.

        Args:
            pixel_values: float32 (num_tiles, 3, T, T).
            rows: where features go, tile after tile.
            first_row: row of the first tile's first patch.

        Raises:
            EngineError: the engine or CUDA failed.
        """
        patches = self._feature_shape[0]
        for start in range(0, len(pixel_values), self._engine.max_tiles):
            tiles = pixel_values[start : start + self._engine.max_tiles]
            pixels = Buffer(tiles.shape, np.float16, "cuda")
            pixels.write(tiles)
            target = rows.address(first_row + start * patches)
            self._engine.run(pixels.address, len(tiles), target, self._cuda.stream)
            # The pixels' memory is free again behind this line.
            self._cuda.synchronize()

    def warm_up(self) -> None:
        """Run one empty tile: what cannot run fails here, and TensorRT-RTX compiles its kernels.

        Raises:
            EngineError: it does not run, or what it computes is not finite.
        """
        rows = self.new_rows(self._feature_shape)
        self.encode_rows(np.zeros((1, *self._tile_shape), np.float32), rows, 0)
        if not np.isfinite(rows.read()).all():
            raise EngineError(
                f"{self._engine.library} computes features that are not finite for an empty tile."
            )
