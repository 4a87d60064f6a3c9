"""VisionEncoder: tiles to projected patch features, a few tiles at a time.

One call of the graph per batch bounds the activations; the results land side by side in one buffer.
"""

from __future__ import annotations

import numpy as np

from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.graph_inputs import POOLING
from llava_edge.runtime.backends.onnxruntime import Buffer, Session
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.pooling import pooling_index


class VisionEncoder:
    """Tower and projector behind their graph.

    Args:
        session: the vision graph.
        dims: model dimensions.
        tiles_per_batch: tiles computed at once.
        dtype: float32 (cpu target) or float16 (cuda target) of pixels and features.

    Attributes:
        tiles_per_batch: as given, unless memory does not suffice for so many.
    """

    def __init__(
        self,
        session: Session,
        dims: ModelDims,
        tiles_per_batch: int,
        dtype: type[np.float32] | type[np.float16],
    ) -> None:
        self._session = session
        self.tiles_per_batch = tiles_per_batch
        self._dtype = dtype
        self._vision = dims.vision
        self._pools = session.has_input(POOLING)
        self.num_patches = dims.vision.num_patches

    def encode(self, pixel_values: Array, out: Array) -> None:
        """Write the features of all tiles, or of all frames of a video.

        Args:
            pixel_values: float32 (num_tiles, 3, T, T).
            out: (num_tiles, patches, hidden) in the target's type, contiguous; with the tokens of
                a frame in place of patches a video model pools them.
        """
        num_tiles = pixel_values.shape[0]
        for start in range(0, num_tiles, self.tiles_per_batch):
            stop = min(start + self.tiles_per_batch, num_tiles)
            tiles = np.ascontiguousarray(pixel_values[start:stop], self._dtype)
            self._encode_batch(tiles, out[start:stop])

    def _encode_batch(self, tiles: Array, out: Array) -> None:
        binding = self._session.binding()
        if self._pools:
            index = pooling_index(self._vision, out.shape[1])
            binding.input(POOLING, Buffer.holding(index, *self._session.place))
        if self._session.device == "cpu":
            binding.input("pixel_values", Buffer.over(tiles))
            binding.output("image_features", Buffer.over(out))
            binding.run(shrink=True)
            return
        pixels = Buffer.holding(tiles, *self._session.place)
        features = Buffer.unwritten(out.shape, self._dtype, *self._session.place)
        binding.input("pixel_values", pixels)
        binding.output("image_features", features)
        binding.run()
        out[...] = features.read()
