"""Video files for tests, encoded on the spot."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray


def moving(count: int, height: int = 48, width: int = 64) -> list[NDArray[np.uint8]]:
    """Frames of one grey each, brighter from frame to frame, so that a codec keeps them apart."""
    levels = np.linspace(20, 230, count).astype(np.uint8)
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def encoded(
    frames: list[NDArray[np.uint8]],
    container: str = "mp4",
    codec: str = "libx264",
    rate: int = 10,
    **options: Any,
) -> bytes:
    """A video file's bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()
