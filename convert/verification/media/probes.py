"""Conversations with files: pictures and videos as users give them, several at once.

Two pictures of different grids in two turns, the second of the largest grid, so that a fault of a
later tile, a second picture or a second turn shows; two pictures in one message; and a picture
beside a video.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.verification.media.image_files import encoded, mosaic, oriented
from llava_edge.convert.verification.media.video_files import ClipFile, clip_files
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.artifact.manifest import Manifest

_TURNED, _MIRRORED = 6, 4
"""Orientations of the pictures' files."""


@dataclass(frozen=True)
class MediaTurn:
    """What is asked with which files, and what is taken for the answer; the last has none."""

    text: str
    pictures: tuple[bytes, ...] = ()
    clip: ClipFile | None = None
    answer: str = ""


@dataclass(frozen=True)
class MediaProbe:
    """One conversation.

    Attributes:
        name: in the certificate.
        turns: oldest first.
        features: whether what the decoder reads is compared as well.
    """

    name: str
    turns: tuple[MediaTurn, ...]
    features: bool = False


def media_probes(manifest: Manifest, anyres: AnyRes) -> tuple[MediaProbe, ...]:
    """The conversations for an artifact, the same at each call."""
    tall, wide, largest = _tall(), encoded(mosaic(seed=3), "PNG"), _largest(anyres)
    opening = MediaTurn("What is on this one?", (tall,), answer="A mosaic of fifteen squares.")
    probes = [
        MediaProbe("two turns", (opening, MediaTurn("And on this?", (largest,))), features=True),
        MediaProbe("two files", (MediaTurn("Compare them.", (wide, tall)),)),
    ]
    video = manifest.video_processing
    clips = clip_files(0 if video is None else video.max_frames)
    turned = [clip for clip in clips if clip.portable and clip.turns]
    if turned:
        probes.append(
            MediaProbe("picture and video file", (MediaTurn("Watch it.", (wide,), turned[0]),))
        )
    return tuple(probes)


def _tall() -> bytes:
    """A picture of a cheap grid, upright after a quarter turn only."""
    exif = oriented(_TURNED)
    return encoded(mosaic(seed=1), "JPEG", quality=100, subsampling=0, exif=exif)


def _largest(anyres: AnyRes) -> bytes:
    """A picture that needs the largest grid."""
    size = max(_sizes(anyres), key=lambda size: anyres.layout(*size).num_tiles)
    return encoded(_mosaic(*size), "PNG", exif=oriented(_MIRRORED))


def _sizes(anyres: AnyRes) -> Iterator[tuple[int, int]]:
    """Heights and widths, one at least for every candidate."""
    tile = anyres.tile_size
    for height, width in anyres.candidates or ((tile, tile),):
        smaller = height * 5 // 6, width * 5 // 6 - 3
        wanted = (height // tile, width // tile)
        layout = anyres.layout(*smaller)
        fits = (layout.rows, layout.columns) == wanted or not anyres.candidates
        # A picture of the candidate's own size fills it without waste.
        yield smaller if fits else (height, width)


def _mosaic(height: int, width: int) -> NDArray[np.uint8]:
    """Squares of other colours everywhere, so that no tile is like another."""
    generator = np.random.Generator(np.random.PCG64(2))
    colours = generator.integers(0, 256, (7, 9, 3), np.uint8)
    rows, columns = (np.arange(n) * m // n for n, m in ((height, 7), (width, 9)))
    return colours[rows[:, None], columns[None]]
