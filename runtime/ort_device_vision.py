"""OrtDeviceEncoder: the tower in ONNX Runtime's CUDA provider, its features left on the device.

Without it every image's features are copied to the host and, chunk by chunk, back again: 24 MB each
way for a full image of a 7B model.
"""

from __future__ import annotations

import numpy as np

from llava_edge.runtime.cuda_runtime import CudaRuntime
from llava_edge.runtime.device_rows import DeviceRows
from llava_edge.runtime.session import Array, Buffer, Session


class OrtDeviceEncoder:
    """Tower and projector behind their graph.

    Args:
        session: the vision graph on cuda; of a model without video.
        cuda: its stream carries copies.
        tiles_per_batch: tiles computed at once.
        feature_shape: (patches, hidden) of one tile.
    """

    def __init__(
        self,
        session: Session,
        cuda: CudaRuntime,
        tiles_per_batch: int,
        feature_shape: tuple[int, int],
    ) -> None:
        self._session = session
        self._cuda = cuda
        self._tiles_per_batch = tiles_per_batch
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
            EngineError: ONNX Runtime or CUDA failed.
        """
        for start in range(0, len(pixel_values), self._tiles_per_batch):
            tiles = pixel_values[start : start + self._tiles_per_batch]
            pixels = Buffer(tiles.shape, np.float16, self._session.device)
            pixels.write(tiles)
            shape = (len(tiles), *self._feature_shape)
            features = Buffer(shape, np.float16, self._session.device)
            binding = self._session.binding()
            binding.input("pixel_values", pixels)
            binding.output("image_features", features)
            # It returns when all is done, so that our stream may read what it wrote.
            binding.run()
            target = rows.address(first_row + start * self._feature_shape[0])
            self._cuda.move(target, features.address, features.nbytes)
            # The memory of both buffers is free again behind this line.
            self._cuda.synchronize()

    def close(self) -> None:
        """Give the stream back; idempotent."""
        self._cuda.close()
