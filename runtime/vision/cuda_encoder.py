"""OrtDeviceEncoder: the tower in ONNX Runtime's CUDA provider, its features left on the device.

Without it every image's features are copied to the host and, chunk by chunk, back again: 24 MB each
way for a full image of a 7B model.
"""

from __future__ import annotations

import numpy as np

from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Buffer, Session
from llava_edge.runtime.vision.gpu_encoder import GpuEncoder


class OrtDeviceEncoder(GpuEncoder):
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
        super().__init__(cuda, tiles_per_batch, feature_shape, session.place)
        self._session = session

    def _encode_batch(self, pixels: Buffer, target: int) -> None:
        shape = (pixels.shape[0], *self._feature_shape)
        features = Buffer.unwritten(shape, np.float16, *self._session.place)
        binding = self._session.binding()
        binding.input("pixel_values", pixels)
        binding.output("image_features", features)
        # It returns when all is done, so that our stream may read what it wrote.
        binding.run()
        self._cuda.move(target, features.address, features.nbytes)
        # The memory of both buffers is free again behind this line.
        self._cuda.synchronize()

    def close(self) -> None:
        """Give the stream back; idempotent."""
        self._cuda.close()
