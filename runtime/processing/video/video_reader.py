"""Videos, opened within the limits; chosen frames are handed out upright.

A file is decoded with PyAV (FFmpeg). FFmpeg would take nearly any file for a video, among them play
lists that name other files and addresses; so the container is told from the first bytes and fixed,
its data is read through one open file, nothing else can be opened, and only some codecs are
decoded. What a header says is not believed: packets are counted before anything is decoded, and the
number of frames is what decodes. A recording that starts between key frames, a cut at an open group
of pictures or a damaged packet gives fewer frames than packets, and every player plays them.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, NoReturn, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llava_edge.profiles.errors import (
    DependencyError,
    ImageError,
    LlavaEdgeError,
    OutOfMemoryError,
    VideoError,
    plain_reason,
)
from llava_edge.profiles.memory.buffers import video_decoding_bytes
from llava_edge.profiles.sizes import format_above, format_bytes
from llava_edge.runtime.processing.images.loading import ImageSource, open_image
from llava_edge.runtime.processing.video.video_orientation import (
    display_matrix,
    tagged_matrix,
    transformed,
)
from llava_edge.runtime.util.allocation import require_free
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.safe_open import NotRegularError, open_plain

Pixels = NDArray[np.uint8]
VideoSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | Sequence[ImageSource]
    | NDArray[np.uint8]
)

_DEMUXERS = {"MP4": "mov", "WEBM": "matroska", "AVI": "avi", "TS": "mpegts"}
_HEAD_BYTES = 1024
_TS_PACKETS = ((0, 188), (4, 192))
"""Where the sync byte of a transport stream stands first, and how far apart the others are."""
_MOV_ATOMS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


class Video(Protocol):
    """Frames by number."""

    @property
    def expected(self) -> int:
        """Frames that there seem to be, known without decoding."""

    @property
    def total(self) -> int:
        """Frames that there are; a file is decoded to its end to know, once."""

    def count(self, at_most: int) -> int:
        """Frames that there are, counted no further than ``at_most``."""

    def frames(self, numbers: Sequence[int]) -> Iterator[Pixels]:
        """Frames of ascending numbers, uint8 (height, width, 3), all of one size.

        Ends early where there are fewer frames. Once it has ended, ``total`` costs nothing.
        """

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how frames were read; complete once ``total`` is known."""


@contextmanager
def open_video(source: VideoSource, limits: Limits) -> Iterator[Video]:
    """Open a video file, its bytes, or a list of frames.

    Args:
        source: path or content of a video file; or frames: a list of what ``open_image`` takes, or
            a uint8 array (frames, height, width, 3).
        limits: bounds on what is taken in.

    Raises:
        VideoError: it is missing, damaged, of another kind, or beyond a limit.
        DependencyError: PyAV is not installed, and frames are to be decoded.
    """
    if isinstance(source, (str, os.PathLike)):
        label = f"video {os.fspath(source)!r:.200}"
        with _opened(label, source) as file:
            yield VideoReader(label, file, os.fstat(file.fileno()).st_size, limits)
        return
    if isinstance(source, (bytes, bytearray, memoryview)):
        label = f"video of {len(source)} bytes"
        yield VideoReader(label, io.BytesIO(source), len(source), limits)
        return
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise VideoError(
            f"video is an array of shape {source.shape}; frames are (frames, height, width, 3)"
        )
    if not isinstance(source, (Sequence, np.ndarray)):
        raise VideoError(
            f"video is a {type(source).__name__}; give a path, bytes, a list of frames or a uint8 "
            "array (frames, height, width, 3)"
        )
    frames: Any = source
    yield FrameList(frames, limits)


class FrameList:
    """Frames that are there already.

    Raises:
        VideoError: there is none, or there are more than the limit.
    """

    def __init__(self, source: Sequence[ImageSource] | Pixels, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        _check_count("the list of frames", len(source), limits)

    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Frames of the list."""
        return len(self._source)

    @property
    def expected(self) -> int:
        """See ``Video``."""
        return self.total

    def count(self, at_most: int) -> int:
        """See ``Video``."""
        return min(self.total, at_most)

    def frames(self, numbers: Sequence[int]) -> Iterator[Pixels]:
        """See ``Video``."""
        first: tuple[int, ...] | None = None
        for number in numbers:
            source = self._source[number]
            if isinstance(source, np.ndarray) and source.dtype not in (np.uint8, np.uint16):
                # One frame alone does not tell which range all of them have.
                raise VideoError(
                    f"frame {number}: image array of type {source.dtype}; frames are uint8. Scale "
                    "all frames alike."
                )
            try:
                frame = np.asarray(open_image(source, self._limits))
            except ImageError as error:
                raise VideoError(f"frame {number}: {error}") from error
            first = first or frame.shape
            if frame.shape != first:
                raise VideoError(
                    f"frame {number} is {frame.shape[0]}x{frame.shape[1]} (height x width), the "
                    f"first is {first[0]}x{first[1]}; all frames of a video have one size"
                )
            yield frame


class VideoReader:
    """A video file, counted on opening.

    Args:
        label: what messages call it.
        file: readable and seekable; read again for every use.
        size: of the file in bytes.
        limits: see ``open_video``.

    Raises:
        VideoError: see ``open_video``.
        DependencyError: PyAV is not installed.
    """

    def __init__(self, label: str, file: BinaryIO, size: int, limits: Limits) -> None:
        if size > limits.max_video_bytes:
            raise VideoError(
                f"{label} has {format_above(size, limits.max_video_bytes)}; at most "
                f"{format_bytes(limits.max_video_bytes)} are taken (max_video_bytes). "
                "Save it smaller or raise the limit."
            )
        self._label = label
        self._file = file
        self._limits = limits
        self._av = _load_av()
        self._demuxer = self._told_from_content()
        self._size: tuple[int, int] = (0, 0)
        self._expected = self._count_packets()
        self._total: int | None = None
        self._least = 0
        self._damage = ""
        self._orientation_note = ""

    @property
    def expected(self) -> int:
        """Packets of the video stream."""
        return self._expected

    @property
    def total(self) -> int:
        """Frames of the video stream that decode."""
        if self._total is None:
            for _ in self._decoded():
                pass
        assert self._total is not None
        return self._total

    @property
    def notes(self) -> tuple[str, ...]:
        """See ``Video``."""
        return tuple(filter(None, (self._damage, self._orientation_note)))

    def count(self, at_most: int) -> int:
        """See ``Video``."""
        if self._total is None and self._least < at_most:
            for number, _ in enumerate(self._decoded(), start=1):
                if number == at_most:
                    self._least = number
                    return at_most
        return min(at_most, self._least if self._total is None else self._total)

    def frames(self, numbers: Sequence[int]) -> Iterator[Pixels]:
        """See ``Video``; the first time everything is decoded, later up to the last frame."""
        left = list(numbers)
        for number, (frame, tag) in enumerate(self._decoded()):
            if left and left[0] == number:
                if (frame.height, frame.width) != self._size:
                    raise VideoError(
                        f"{self._label}: frame {number} is {frame.height}x{frame.width} (height x "
                        f"width), the header says {self._size[0]}x{self._size[1]}. All frames of a "
                        "video have one size."
                    )
                pixels = self._once(partial(frame.to_ndarray, format="rgb24"))
                pixels = self._upright(pixels, frame, tag)
                while left and left[0] == number:
                    left.pop(0)
                    yield pixels
            if not left and self._total is not None:
                return

    def _decoded(self) -> Iterator[tuple[Any, str]]:
        """Every frame that decodes, with the rotation that the stream's tag tells.

        Damaged packets are passed over. At the end the number of frames is known.
        """
        require_free(video_decoding_bytes(self._size[0] * self._size[1]), self._label)
        count = damaged = 0
        reason = ""
        passed_over = (self._av.error.InvalidDataError, self._av.error.PatchWelcomeError)
        with self._stream() as (container, stream):
            tag = next((v for k, v in stream.metadata.items() if k.lower() == "rotate"), "")
            for packet in self._packets(container, stream):
                try:
                    frames = self._once(packet.decode)
                except VideoError as error:
                    if not isinstance(error.__cause__, passed_over):
                        raise
                    damaged, reason = damaged + 1, reason or str(error.__cause__)
                    continue
                for frame in frames:
                    count += 1
                    _check_count(self._label, count, self._limits)
                    yield frame, tag
        if not count:
            raise VideoError(
                f"{self._label} cannot be decoded: none of its {self._expected} packets gives a "
                f"frame{f' ({reason:.200})' if reason else ''}. The file may be cut off or damaged."
            )
        self._total = count
        if damaged:
            self._damage = (
                f"{self._label}: damaged packets were passed over ({damaged}); frames were chosen "
                f"from the {count} that decode"
            )

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Packets up to the end or to where the file is damaged, the last ones empty."""
        packets = self._guarded(lambda: container.demux(stream))
        some = False
        while True:
            try:
                packet = next(packets, None)
            except VideoError as error:
                if not some or not isinstance(error.__cause__, self._av.error.InvalidDataError):
                    raise
                # What was read so far is a video; the decoder hands over what it still holds.
                packet = self._av.Packet(0)
                packet.stream = stream
                yield packet
                return
            if packet is None:
                return
            some = some or packet.size > 0
            yield packet

    def _upright(self, pixels: Pixels, frame: Any, tag: str) -> Pixels:
        """A frame as the file says that it is to be seen."""
        matrix, asked = display_matrix(frame), str(frame.rotation)
        if matrix is None and tag:
            matrix, asked = tagged_matrix(tag), tag.strip()
        upright = pixels if matrix is None else transformed(pixels, matrix)
        if upright is None:
            self._orientation_note = (
                f"{self._label}: its metadata asks for a rotation by {asked:.20} degrees; only "
                "quarter turns are applied, so frames are as they are stored"
            )
            return pixels
        return upright

    def _told_from_content(self) -> str:
        try:
            self._file.seek(0)
            # Nothing, where a file of /proc would have to be waited for.
            head = self._file.read(_HEAD_BYTES) or b""
        except OSError as error:
            raise VideoError(f"{self._label} cannot be read: {error.strerror}") from error
        found = None
        if head[4:8] in _MOV_ATOMS:
            found = "MP4"
        elif head.startswith(b"\x1a\x45\xdf\xa3"):
            found = "WEBM"
        elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
            found = "AVI"
        elif any(
            len(head) > start + 2 * apart and set(head[start : start + 3 * apart : apart]) == {0x47}
            for start, apart in _TS_PACKETS
        ):
            found = "TS"
        if found not in self._limits.video_formats:
            raise VideoError(
                f"{self._label} is {'no video of a known format' if found is None else found}; "
                f"allowed are {', '.join(self._limits.video_formats)} (MP4 with MOV, WEBM with "
                "MKV). Convert it, or give frames as a list."
            )
        return _DEMUXERS[found]

    def _count_packets(self) -> int:
        limits = self._limits
        count, first, last = 0, None, None
        with self._stream() as (container, stream):
            context = stream.codec_context
            codec = context.codec.canonical_name
            if codec not in limits.video_codecs:
                raise VideoError(
                    f"{self._label} is encoded as {codec!r:.40}; allowed codecs are "
                    f"{', '.join(limits.video_codecs)}. Convert it, or give frames as a list."
                )
            self._size = (int(context.height), int(context.width))
            self._check_size(*self._size)
            for packet in self._packets(container, stream):
                if not packet.size or packet.is_discard:
                    continue
                count += 1
                if packet.pts is not None and packet.time_base is not None:
                    at = float(packet.pts * packet.time_base)
                    first = at if first is None else min(first, at)
                    last = at if last is None else max(last, at)
                if count > limits.max_video_frames:
                    break
                if first is not None and last is not None:
                    self._check_seconds(last - first)
        _check_count(self._label, count, limits)
        return count

    def _check_size(self, height: int, width: int) -> None:
        limits, faults = self._limits, []
        if height * width > limits.max_video_pixels:
            faults.append(f"more than {limits.max_video_pixels} pixels (max_video_pixels)")
        if max(height, width) > limits.max_image_side:
            faults.append(f"a side is longer than {limits.max_image_side} (max_image_side)")
        if height < 1 or width < 1:
            faults.append("there is no pixel")
        if faults:
            raise VideoError(
                f"{self._label} is {height}x{width} (height x width): {'; '.join(faults)}. Scale "
                "it down or raise the limit."
            )

    def _check_seconds(self, seconds: float) -> None:
        if seconds > self._limits.max_video_seconds:
            raise VideoError(
                f"{self._label} lasts {seconds:.0f} s or more; at most "
                f"{self._limits.max_video_seconds} are taken (max_video_seconds). Cut it or raise "
                "the limit."
            )

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        """The container, opened from its beginning, and its first video stream."""
        self._file.seek(0)

        def no_other(*_: object) -> NoReturn:
            raise VideoError(f"{self._label} refers to another file; nothing else is opened")

        container = self._once(
            lambda: self._av.open(self._file, "r", format=self._demuxer, io_open=no_other)
        )
        try:
            if not container.streams.video:
                raise VideoError(f"{self._label} holds no video, only other streams")
            moving = [stream for stream in container.streams.video if not _is_picture(stream)]
            if not moving:
                raise VideoError(
                    f"{self._label} holds no video, only a cover picture. Give it as an image."
                )
            stream = moving[0]
            if stream.codec_context is None:
                raise VideoError(
                    f"{self._label} holds a video that FFmpeg has no decoder for; allowed codecs "
                    f"are {', '.join(self._limits.video_codecs)}. Convert it, or give frames as a "
                    "list."
                )
            # FFmpeg itself refuses a picture that grows behind the header's back.
            stream.codec_context.options = {"max_pixels": str(self._limits.max_video_pixels)}
            yield container, stream
        finally:
            container.close()

    def _once(self, act: Callable[[], Any]) -> Any:
        return next(self._guarded(lambda: [act()]))

    def _guarded(self, act: Callable[[], Any]) -> Iterator[Any]:
        """What ``act`` gives, with errors of the decoder as errors of ours."""
        try:
            yield from act()
        except (LlavaEdgeError, GeneratorExit):
            raise
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{self._label}: memory ran out while it was decoded, or it asks for far too much"
            ) from error
        except Exception as error:
            # FFmpeg's errors come as many classes.
            raise VideoError(
                f"{self._label} cannot be decoded: {plain_reason(error):.200}. The file may be cut "
                "off or damaged."
            ) from error


@contextmanager
def _opened(label: str, path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    try:
        descriptor = open_plain(path)
    except NotRegularError as error:
        raise VideoError(f"{label} is no regular file; give a video file") from error
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise VideoError(
            f"{label} cannot be read: {reason}. Videos are files on this machine; nothing is "
            "fetched."
        ) from error
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _check_count(label: str, count: int, limits: Limits) -> None:
    if not count:
        raise VideoError(f"{label} holds no frame")
    if count > limits.max_video_frames:
        raise VideoError(
            f"{label} has more than {limits.max_video_frames} frames (max_video_frames). Cut it or "
            "raise the limit."
        )


def _is_picture(stream: Any) -> bool:
    """Whether a stream is a cover or thumbnails, not what is played."""
    kinds = type(stream.disposition)
    return bool(stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails))


def _load_av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise DependencyError(
            "Decoding a video needs PyAV, which is not installed. Install it with: "
            "pip install 'llava-edge[video]'. A list of frames needs nothing."
        ) from error
