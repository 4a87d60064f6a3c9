"""Video files that an artifact is verified with, written with PyAV on the spot.

The frames of a ``portable`` clip are black, white or of a full colour, in even squares, far beyond
what the range of a video holds: whatever a codec loses and however a library makes RGB of it, the
pixels are the same on every machine. The others are what cameras write; they are compared where
both sides use the same FFmpeg. Encoders are FFmpeg's own (mpeg4, mjpeg), which every build has.

Sources: FFmpeg ``libavutil/display.h`` (matrix), QuickTime file format (track header).
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_edge.runtime.processing.video.frame_sampling import FrameChoice

Pixels = NDArray[np.uint8]

_SQUARE = 16
"""A block of both codecs, with its colour."""
_SHAPE = (3, 5)
"""Squares downwards and across."""
_TOTAL = 11
"""Frames; no number that is looked at divides it."""
_BLACK, _WHITE, _GREY = 4, 251, 128
_COLOURS = ((72, 80, 254), (140, 20, 20), (26, 254, 114))
"""Red, green and blue as luma and both colour differences."""


@dataclass(frozen=True)
class ClipFile:
    """One file, and which of its frames are looked at.

    Attributes:
        name: in reports; its first word is the container, as ``limits`` calls it.
        data: the whole file.
        turns: quarter turns, counter-clockwise, after which its stored frames stand upright.
        flips: whether they are mirrored then, left and right.
        num_frames: how many frames are looked at.
        asked_frames: how many are asked for; None where ``num_frames`` are the most that the model
            takes or the file has.
        frame_choice: by which rule.
        portable: whether every machine decodes it to the same pixels.
        total: frames that it has.
    """

    name: str
    data: bytes
    turns: int
    flips: bool
    num_frames: int
    asked_frames: int | None
    frame_choice: FrameChoice
    portable: bool
    total: int = _TOTAL

    @property
    def format(self) -> str:
        """As ``limits.VIDEO_FORMATS`` calls it."""
        return self.name.split()[0].rstrip(",")

    @property
    def is_counted(self) -> bool:
        """Whether the container tells how many frames there are."""
        return self.format in ("MP4", "AVI")

    def upright(self, frames: Pixels) -> Pixels:
        """Stored frames (n, height, width, 3) as they are to be seen."""
        turned = np.rot90(frames, self.turns, axes=(1, 2))
        return np.ascontiguousarray(turned[:, :, ::-1] if self.flips else turned)


def can_decode() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


@cache
def clip_files(max_frames: int) -> tuple[ClipFile, ...]:
    """Every clip, the same bytes at each call.

    Args:
        max_frames: most frames that the model looks at; 0 for a model without videos.

    Returns:
        None at all without PyAV.
    """
    if not max_frames or not can_decode():
        return ()
    some, few = min(max_frames, 4), min(max_frames, 3)
    flat, textured = _flat(), _textured()
    plain = _encoded(flat, "mp4")
    return (
        _clip("MP4", plain, 0, some),
        _clip("MP4, a quarter turn", plain, 1, some),
        _clip("MP4, a quarter turn back", plain, -1, few, "original"),
        _clip("MP4, upside down", plain, 2, few),
        _clip("MP4, mirrored", plain, 0, some, flips=True),
        # The tag of older files counts clockwise.
        _clip("WEBM, turned by a tag", _encoded(flat, "matroska", rotate="270"), 1, few),
        _clip("AVI", _encoded(flat, "avi"), 0, some, "original"),
        _clip("TS", _encoded(flat, "mpegts"), 0, min(max_frames, _TOTAL), asks=False),
        _clip("MP4, textured", _encoded(textured, "mp4"), 0, some, portable=False),
        _clip("AVI, pictures", _encoded(textured, "avi", "mjpeg"), 0, few, portable=False),
    )


def _clip(
    name: str,
    data: bytes,
    turns: int,
    num_frames: int,
    frame_choice: FrameChoice = "reference",
    *,
    flips: bool = False,
    asks: bool = True,
    portable: bool = True,
) -> ClipFile:
    if name.startswith("MP4") and (turns or flips):
        data = _with_matrix(data, turns, flips)
    asked = num_frames if asks else None
    return ClipFile(name, data, turns, flips, num_frames, asked, frame_choice, portable)


def _with_matrix(data: bytes, turns: int, flips: bool) -> bytes:
    """An MP4 file whose track header has a player rotate and mirror the frames.

    A pixel (x, y), y downwards, is seen at (a x + c y, b x + d y).
    """
    a, b, c, d = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))[turns % 4]
    if flips:
        a, c = -a, -c
    unit = 1 << 16
    matrix = struct.pack(">9i", a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30)
    # Kind, version and flags, then 36 bytes of times, numbers, layer and volume.
    start = data.index(b"tkhd") + 8 + 36
    return data[:start] + matrix + data[start + len(matrix) :]


def _flat() -> list[Pixels]:
    """Frames of one mosaic of black and white each, or of one colour: Y, Cb, Cr (height, width)."""
    generator = np.random.Generator(np.random.PCG64(6))
    frames = []
    for number in range(_TOTAL):
        luma = generator.choice(np.array([_BLACK, _WHITE], np.uint8), _SHAPE)
        luma[0, 0], luma[-1, -1] = _BLACK, _WHITE
        planes = np.full((3, *_SHAPE), _GREY, np.uint8)
        planes[0] = luma
        if number % 3 == 1:
            planes[...] = np.array(_COLOURS[number // 3 % 3])[:, None, None]
        frames.append(np.repeat(np.repeat(planes, _SQUARE, axis=1), _SQUARE, axis=2))
    return frames


def _textured() -> list[Pixels]:
    """Frames in which no two regions are alike, another each."""
    y, x = np.mgrid[0:52, 0:78]
    frames = []
    for number in range(_TOTAL):
        waves = [126 + 60 * np.sin(x / 9 + y / (7 + 3 * c) + number + c) for c in range(3)]
        frames.append(np.stack(waves).astype(np.uint8))
    return frames


def _encoded(
    frames: Sequence[Pixels], container: str, codec: str = "mpeg4", rotate: str = ""
) -> bytes:
    """A file of frames Y, Cb, Cr: of a video's range, or of full range as pictures are (mjpeg)."""
    av: Any = importlib.import_module("av")
    file = io.BytesIO()
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    height, width = frames[0].shape[1:]
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as output:
        options = {"qmin": "2", "qmax": "2", "g": "6", "threads": "1"}
        stream = output.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, form
        if rotate:
            stream.metadata["rotate"] = rotate
        for planes in frames:
            halves = planes[:, ::2, ::2]
            rows = [planes[0], halves[1].reshape(-1, width), halves[2].reshape(-1, width)]
            frame = av.VideoFrame.from_ndarray(np.concatenate(rows), format=form)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
