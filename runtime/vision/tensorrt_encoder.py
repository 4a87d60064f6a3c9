"""TensorRTEncoder: tiles to projected features by a TensorRT engine, all in device memory."""

from __future__ import annotations

import numpy as np

from llava_edge.profiles.errors import EngineError
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.onnxruntime import Buffer
from llava_edge.runtime.backends.tensorrt import TensorRTEngine
from llava_edge.runtime.vision.gpu_encoder import GpuEncoder


class TensorRTEncoder(GpuEncoder):
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
        super().__init__(cuda, engine.max_tiles, feature_shape)
        self._engine = engine
        self._tile_shape = tile_shape

    def _encode_batch(self, pixels: Buffer, target: int) -> None:
        self._cuda.make_current()
        self._engine.run(pixels.address, pixels.shape[0], target, self._cuda.stream)
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
