"""Video files for tests, encoded on the spot."""

from __future__ import annotations

import io
from collections.abc import Callable
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
    prepare: Callable[[Any], None] = lambda stream: None,
    **options: Any,
) -> bytes:
    """A video file's bytes; ``prepare`` changes the stream before anything is encoded."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        prepare(stream)
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


def remuxed(
    data: bytes,
    container: str,
    keep: Callable[[int], bool] = lambda number: True,
    change: Callable[[int, bytes], bytes] = lambda number, content: content,
) -> bytes:
    """The packets of a video in another file, without encoding them again.

    Args:
        data: a video file's bytes.
        container: FFmpeg's name of the new one.
        keep: whether the packet of a number comes along.
        change: gives its content.
    """
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as output:
        stream = source.streams.video[0]
        target: Any = output.add_stream_from_template(stream)
        packets = (packet for packet in source.demux(stream) if packet.dts is not None)
        for number, packet in enumerate(packets):
            if keep(number):
                copy: Any = av.Packet(change(number, bytes(packet)))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe = packet.is_keyframe
                copy.stream = target
                output.mux(copy)
    return file.getvalue()
