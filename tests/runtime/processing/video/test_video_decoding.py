"""The number of frames is what decodes, and frames are handed out upright."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from llava_edge.profiles.errors import VideoError
from llava_edge.runtime.processing.video.video_reader import open_video
from llava_edge.runtime.util.limits import Limits
from tests.support.videos import encoded, moving, remuxed

GROUPS = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:log-level=none"}
OPEN_GROUPS = {"x265-params": "keyint=10:open-gop=1:bframes=3:scenecut=0:log-level=none"}
LIMITS = Limits()


def decodable(data: bytes) -> list[float]:
    """Mean of every frame that FFmpeg gives, whatever becomes of damaged packets."""
    found = []
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            found += [float(frame.to_ndarray(format="rgb24").mean()) for frame in frames]
    return found


def grouped() -> bytes:
    return encoded(moving(40), **GROUPS)


def zeroed(*numbers: int) -> Callable[[int, bytes], bytes]:
    return lambda number, content: bytes(len(content)) if number in numbers else content


CASES: dict[str, tuple[Callable[[], bytes], int]] = {
    **{
        f"starts between key frames, {container}": (
            lambda container=container: remuxed(grouped(), container, lambda n: n > 3),
            30,
        )
        for container in ("matroska", "mp4", "mov", "mpegts")
    },
    "mpeg4 that starts between key frames, avi": (
        lambda: remuxed(encoded(moving(40), "avi", "mpeg4", g="10"), "avi", lambda n: n > 3),
        0,
    ),
    "cut at an open group": (
        lambda: remuxed(
            encoded(moving(40), "mp4", "libx265", **OPEN_GROUPS), "mp4", lambda n: n > 9
        ),
        0,
    ),
    "damaged in the middle, h264": (
        lambda: remuxed(grouped(), "matroska", change=zeroed(13, 14, 25)),
        37,
    ),
    "damaged in the middle, mpeg4": (
        lambda: remuxed(encoded(moving(40), "avi", "mpeg4"), "avi", change=zeroed(13, 25)),
        38,
    ),
    "damaged in the middle, mjpeg": (
        lambda: remuxed(encoded(moving(40), "avi", "mjpeg"), "avi", change=zeroed(0, 25)),
        38,
    ),
    "damaged at both ends": (
        lambda: remuxed(grouped(), "mp4", change=zeroed(0, 1, 39)),
        0,
    ),
    "hidden frames of vp9": (
        lambda: encoded(
            moving(40), "webm", "libvpx-vp9", **{"auto-alt-ref": "1", "lag-in-frames": "25"}
        ),
        40,
    ),
    "two fields a frame": (
        lambda: encoded(moving(20), "mp4", **{"x264-params": "interlaced=1:log-level=none"}),
        20,
    ),
    "a transport stream cut in its middle": (
        lambda: remuxed(grouped(), "mpegts")[188 * 13 :],
        0,
    ),
    "bytes after the end": (lambda: grouped() + bytes(range(256)) * 40, 40),
    "one frame": (lambda: encoded(moving(1)), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_frames_is_what_decodes(name: str) -> None:
    make, known = CASES[name]
    data = make()
    expected = decodable(data)
    assert expected
    assert len(expected) == known or not known

    with open_video(data, LIMITS) as video:
        assert video.total == len(expected)
        frames = [float(frame.mean()) for frame in video.frames(range(video.total))]
    assert frames == pytest.approx(expected, abs=1e-6)


def test_a_file_is_decoded_once_where_every_packet_gives_a_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_video(grouped(), LIMITS) as video:
        assert video.expected == 40
        assert len(list(video.frames([0, 20]))) == 2
        monkeypatch.setattr(video, "_decoded", None)
        assert video.total == 40


def test_frames_are_counted_no_further_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_video(remuxed(grouped(), "matroska", lambda n: n > 3), LIMITS) as video:
        assert video.count(8) == 8
        assert video._total is None  # type: ignore[attr-defined]
        assert video.count(33) == 30
        assert video.count(5) == 5


def test_more_frames_than_there_are_end_early() -> None:
    with open_video(remuxed(grouped(), "matroska", lambda n: n > 3), LIMITS) as video:
        assert len(list(video.frames([0, 29, 30, 35]))) == 2


def test_damage_is_noted_and_a_late_start_is_not() -> None:
    with open_video(remuxed(grouped(), "matroska", change=zeroed(13, 14)), LIMITS) as video:
        assert video.total == 38
        assert "damaged packets were passed over (2)" in video.notes[0]
        assert "the 38 that decode" in video.notes[0]
    with open_video(remuxed(grouped(), "matroska", lambda n: n > 3), LIMITS) as video:
        assert video.total == 30
        assert video.notes == ()


def test_a_video_of_which_nothing_decodes_is_refused() -> None:
    data = remuxed(grouped(), "mp4", change=zeroed(*range(40)))
    with open_video(data, LIMITS) as video, pytest.raises(VideoError) as caught:
        _ = video.total
    assert "none of its 40 packets gives a frame (" in str(caught.value)


def marked(prepare: Callable[[Any], None], container: str = "mp4") -> bytes:
    """A wide video with a red patch on its left upper corner."""
    frame = np.full((48, 96, 3), 90, np.uint8)
    frame[:16, :32] = (220, 30, 30)
    return encoded([frame] * 3, container, prepare=prepare, crf="10")


def first_frame(data: bytes) -> tuple[Any, tuple[str, ...]]:
    with open_video(data, LIMITS) as video:
        (frame,) = video.frames([0])
        return frame, video.notes


ORIENTATIONS: list[tuple[int, bool, bool]] = [
    (degrees, hflip, vflip)
    for degrees in (0, 90, 180, -90)
    for hflip, vflip in ((False, False), (True, False), (False, True))
]


@pytest.mark.parametrize(("degrees", "hflip", "vflip"), ORIENTATIONS)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_frames_are_turned_as_the_file_says(
    container: str, degrees: int, hflip: bool, vflip: bool
) -> None:
    stored, _ = first_frame(marked(lambda stream: None, container))
    data = marked(
        lambda stream: stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip), container
    )
    frame, notes = first_frame(data)

    # Degrees are counted counter-clockwise, flips come after; as FFmpeg documents it.
    expected = np.rot90(stored, degrees // 90)
    expected = expected[:, ::-1] if hflip else expected
    expected = expected[::-1] if vflip else expected
    assert frame.shape == expected.shape
    assert np.array_equal(frame, expected)
    assert frame.flags.c_contiguous
    assert notes == ()


@pytest.mark.parametrize(
    ("tag", "turns"),
    [("90", -1), ("180", 2), ("270", 1), ("-90", 1), ("90.0", -1), ("450", -1), ("0", 0)],
)
def test_the_tag_of_older_files_turns_frames_clockwise(tag: str, turns: int) -> None:
    stored, _ = first_frame(marked(lambda stream: None, "matroska"))
    data = marked(lambda stream: stream.metadata.update({"rotate": tag}), "matroska")
    frame, notes = first_frame(data)

    assert np.array_equal(frame, np.rot90(stored, turns))
    assert notes == ()


@pytest.mark.parametrize("tag", ["45", "nan", "left"])
def test_a_tag_of_no_quarter_turn_is_noted(tag: str) -> None:
    stored, _ = first_frame(marked(lambda stream: None, "matroska"))
    data = marked(lambda stream: stream.metadata.update({"rotate": tag}), "matroska")
    frame, notes = first_frame(data)

    assert np.array_equal(frame, stored)
    assert f"asks for a rotation by {tag} degrees" in notes[0]


def test_a_rotation_that_is_no_quarter_turn_is_noted() -> None:
    stored, _ = first_frame(marked(lambda stream: None))
    frame, notes = first_frame(marked(lambda stream: stream.set_display_rotation(45)))

    assert np.array_equal(frame, stored)
    assert "asks for a rotation by 45" in notes[0]
    assert "as they are stored" in notes[0]


def with_cover(cover_first: bool, container: str = "mp4", only: bool = False) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(picture, "JPEG")
    source = av.open(io.BytesIO(encoded(moving(6), container)))
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        cover: Any
        target: Any = None
        if not cover_first and not only:
            target = output.add_stream_from_template(source.streams.video[0])
        cover = output.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        if target is None and not only:
            target = output.add_stream_from_template(source.streams.video[0])
        output.start_encoding()
        packet: Any = av.Packet(picture.getvalue())
        packet.stream, packet.pts, packet.dts = cover, 0, 0
        output.mux(packet)
        for packet in source.demux(source.streams.video[0]):
            if target is not None and packet.dts is not None:
                packet.stream = target
                output.mux(packet)
    source.close()
    return file.getvalue()


@pytest.mark.parametrize("cover_first", [True, False])
def test_a_cover_picture_is_not_the_video(cover_first: bool) -> None:
    with open_video(with_cover(cover_first), LIMITS) as video:
        assert video.total == 6
        assert next(iter(video.frames([5]))).shape == (48, 64, 3)


def test_a_cover_picture_alone_is_no_video() -> None:
    with (
        pytest.raises(VideoError, match="only a cover picture"),
        open_video(with_cover(cover_first=True, only=True), LIMITS),
    ):
        pass
