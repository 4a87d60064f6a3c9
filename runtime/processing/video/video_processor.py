"""VideoProcessor: frames become normalised pixels, bit-equal to the reference's video processor.

Each frame is resized until its shorter side is a tile's and its middle is cut out. Source:
transformers 5.23.0 ``LlavaNextVideoVideoProcessor`` and ``TorchvisionBackend``. Unlike the
processor of images it folds rescaling into mean and standard deviation, all in float32, and resizes
with torch (``frame_resize``).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llava_edge.runtime.artifact.manifest import VideoProcessing
from llava_edge.runtime.processing.images.image_processor import shorter_side_to
from llava_edge.runtime.processing.tile_pixels import Pixels, TilePixels
from llava_edge.runtime.processing.video.frame_resize import resize_middle
from llava_edge.runtime.util.allocation import allocate


class VideoProcessor:
    """Makes pixels of frames by the values of one artifact; holds no state between calls."""

    def __init__(self, processing: VideoProcessing) -> None:
        self._side = processing.frame_size
        # Means and deviations in units of 8-bit values, rounded as the reference rounds them.
        factor = np.float32(1.0 / processing.rescale_factor)
        mean = np.array(processing.image_mean, np.float32)[:, None] * factor
        std = np.array(processing.image_std, np.float32)[:, None] * factor
        self._normalized = (np.arange(256, dtype=np.float32) - mean) / std

    def preprocess(self, frames: Iterable[NDArray[np.uint8]], count: int) -> Pixels:
        """Resize and cut; one whole frame at a time is held.

        Args:
            frames: uint8 (height, width, 3).
            count: how many there are.

        Returns:
            float32 (count, 3, T, T), normalised when it is read.

        Raises:
            ImageError: frames are so long that next to nothing of them would be seen.
        """
        side = self._side
        pixels = allocate((count, side, side, 3), np.uint8, "a video's frames")
        for place, frame in enumerate(frames):
            height, width = shorter_side_to(side, *frame.shape[:2])
            pixels[place] = resize_middle(frame, height, width, side)
        return TilePixels(pixels, self._normalize)

    def _normalize(self, frame: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        for channel in range(3):
            np.take(self._normalized[channel], frame[..., channel], out=out[channel], mode="clip")
