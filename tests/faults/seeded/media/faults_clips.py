"""Faults in reading video files: orientation, choice of frames, colours, size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava_edge.runtime.processing import processor as request_builder
from llava_edge.runtime.processing.images import loading as images
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.video import video_processor, video_reader
from llava_edge.runtime.processing.video.video_reader import VideoReader
from tests.faults.fault import Fault

_Patch = pytest.MonkeyPatch
_Pixels = NDArray[np.uint8]


def _as_stored(patch: _Patch) -> None:
    patch.setattr(VideoReader, "_upright", lambda self, pixels, frame, tag: pixels)


def _matrix(change: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    real = video_reader.transformed
    return lambda patch: patch.setattr(
        video_reader, "transformed", lambda pixels, matrix: real(pixels, change(matrix))
    )


def _transposed(matrix: Any) -> Any:
    return matrix[0], matrix[2], matrix[1], matrix[3]


def _proper(matrix: Any) -> Any:
    """A mirroring without it: the determinant is above zero."""
    a, b, c, d = (int(each) for each in matrix)
    return (a, b, c, d) if a * d - b * c >= 0 else (-a, b, -c, d)


def _tag_forgotten(patch: _Patch) -> None:
    patch.setattr(video_reader, "tagged_matrix", lambda tag: (1, 0, 0, 1))


def _chosen(change: Callable[[int, int], Sequence[int]]) -> Callable[[_Patch], None]:
    """Other frames by the rule of the reference."""

    def plant(patch: _Patch) -> None:
        real = request_builder.choose_frames

        def choose(total: int, wanted: int, rule: Any = "reference") -> Sequence[int]:
            return change(total, wanted) if rule == "reference" else real(total, wanted, rule)

        patch.setattr(request_builder, "choose_frames", choose)

    return plant


def _by_linspace(total: int, wanted: int) -> Sequence[int]:
    return [int(i) for i in np.linspace(0, total - 1, wanted)]


def _one_later(total: int, wanted: int) -> Sequence[int]:
    return [min(i * total // wanted + 1, total - 1) for i in range(wanted)]


def _middles(total: int, wanted: int) -> Sequence[int]:
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def _consecutive(total: int, wanted: int) -> Sequence[int]:
    return list(range(wanted))


def _rounded_linspace(patch: _Patch) -> None:
    """The original's rule, rounded and not cut."""
    real = request_builder.choose_frames

    def choose(total: int, wanted: int, rule: Any = "reference") -> Sequence[int]:
        if rule == "reference":
            return real(total, wanted, rule)
        return [round(float(at)) for at in np.linspace(0, total - 1, wanted)]

    patch.setattr(request_builder, "choose_frames", choose)


def _listed_as_stored(patch: _Patch) -> None:
    """Frames that are picture files are not rotated."""
    real = video_reader.open_image

    def opened(source: Any, limits: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(images, "orientation_of", lambda _: None)
            return real(source, limits)

    patch.setattr(video_reader, "open_image", opened)


def _fewer_by_default(patch: _Patch) -> None:
    real = RequestBuilder._most_frames

    def most(self: RequestBuilder, video: Any) -> int:
        found = real(self, video)
        return found if video.num_frames is not None else max(1, found // 2)

    patch.setattr(RequestBuilder, "_most_frames", most)


def _frames(change: Callable[[list[_Pixels]], list[_Pixels]]) -> Callable[[_Patch], None]:
    """What a file's chosen frames become."""

    def plant(patch: _Patch) -> None:
        real = VideoReader.frames

        def frames(self: VideoReader, numbers: Sequence[int]) -> Iterator[_Pixels]:
            yield from change(list(real(self, numbers)))

        patch.setattr(VideoReader, "frames", frames)

    return plant


def _last_again(found: list[_Pixels]) -> list[_Pixels]:
    return [*found[:-1], found[-2]]


def _narrow(found: list[_Pixels]) -> list[_Pixels]:
    return [(16 + frame.astype(np.float32) * 219 / 255).astype(np.uint8) for frame in found]


def _bilinear(patch: _Patch) -> None:
    def resize(frame: _Pixels, height: int, width: int, side: int) -> _Pixels:
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        top, left = (height - side) // 2, (width - side) // 2
        return np.asarray(image)[top : top + side, left : left + side]

    patch.setattr(video_processor, "resize_middle", resize)


def _cut_off_middle(patch: _Patch) -> None:
    """The square is cut one pixel to the right of the middle."""
    real = video_processor.resize_middle

    def resize(frame: _Pixels, height: int, width: int, side: int) -> _Pixels:
        return np.roll(real(frame, height, width, side), -1, axis=1)

    patch.setattr(video_processor, "resize_middle", resize)


def _video(id_: str, wrong: str, plant: Callable[[_Patch], None], model: str = "video") -> Fault:
    return Fault(id_, "video files", wrong, "runtime", "preprocessing", plant, model=model)


FAULTS: tuple[Fault, ...] = (
    _video("as stored", "frames are not rotated", _as_stored, "video int8"),
    _video("rotated back", "quarter turns go the other way", _matrix(_transposed)),
    _video("not mirrored", "frames are rotated and not mirrored", _matrix(_proper)),
    _video("tag forgotten", "the tag of older files is not seen", _tag_forgotten, "video int4"),
    _video("frames by linspace", "frames from the first to the last", _chosen(_by_linspace)),
    _video("frames one later", "each frame is the one after", _chosen(_one_later), "video int8"),
    _video("middle frames", "frames from the middle of each part", _chosen(_middles)),
    _video("first frames", "the first frames, one after another", _chosen(_consecutive)),
    _video("original's rule rounded", "its points are rounded, not cut", _rounded_linspace),
    _video("half of the frames", "unasked, half as many frames are seen", _fewer_by_default),
    _video("last frame repeated", "the last frame but one is seen twice", _frames(_last_again)),
    _video(
        "first frame alone",
        "all frames are the first",
        _frames(lambda found: found[:1] * len(found)),
        "video int4",
    ),
    _video("narrow range", "levels are left in the range of a video", _frames(_narrow)),
    _video(
        "frames as BGR",
        "frames are read as blue, green, red",
        _frames(lambda found: [frame[..., ::-1] for frame in found]),
    ),
    _video("frames bilinear", "frames are resized bilinearly", _bilinear),
    _video("frames cut off the middle", "a pixel to the right of it", _cut_off_middle),
)

AT_VERIFICATION: tuple[Fault, ...] = (
    _video(
        "listed frames as stored",
        "frames that are picture files are not rotated",
        _listed_as_stored,
    ),
)
"""Not looked at on a device: lists of frames are, and picture files, each by themselves."""
