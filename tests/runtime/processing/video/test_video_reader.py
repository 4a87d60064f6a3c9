"""Videos are opened within limits, whatever their headers say; frames come by number."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from llava_edge.profiles.errors import DependencyError, OutOfMemoryError, VideoError
from llava_edge.runtime.processing.video import video_reader
from llava_edge.runtime.processing.video.video_reader import VideoSource, open_video
from llava_edge.runtime.util.limits import Limits
from tests.support.videos import encoded, moving

CONTAINERS = {
    "h264 in mp4": ("mp4", "libx264"),
    "mpeg4 in mov": ("mov", "mpeg4"),
    "vp9 in webm": ("webm", "libvpx-vp9"),
    "vp8 in mkv": ("matroska", "libvpx"),
    "mjpeg in avi": ("avi", "mjpeg"),
}


def levels(source: VideoSource, numbers: list[int], limits: Limits | None = None) -> list[float]:
    """Mean grey of some frames."""
    with open_video(source, limits or Limits()) as clip:
        return [float(frame.mean()) for frame in clip.frames(numbers)]


def refused(source: Any, limits: Limits | None = None) -> str:
    with pytest.raises(VideoError) as caught, open_video(source, limits or Limits()) as clip:
        list(clip.frames(range(clip.total)))
    return str(caught.value)


@pytest.mark.parametrize(("container", "codec"), CONTAINERS.values(), ids=CONTAINERS)
def test_chosen_frames_come_in_order(container: str, codec: str, tmp_path: Path) -> None:
    frames = moving(20)
    data = encoded(frames, container, codec)
    path = tmp_path / "clip"
    path.write_bytes(data)
    wanted = [0, 7, 7, 19]

    for source in (path, str(path), data, memoryview(data)):
        with open_video(source, Limits()) as clip:
            assert clip.total == 20
        found = levels(source, wanted)
        assert found == pytest.approx([frames[n].mean() for n in wanted], abs=6)


def test_frames_of_a_list_are_taken_as_they_are() -> None:
    arrays = moving(5)
    as_images = [Image.fromarray(frame) for frame in arrays]

    for source in (arrays, as_images, np.stack(arrays)):
        assert levels(source, [1, 4]) == [float(arrays[1].mean()), float(arrays[4].mean())]


def test_frames_of_several_sizes_are_refused() -> None:
    frames = [*moving(2), *moving(1, 50, 64)]

    assert "frame 2 is 50x64 (height x width), the first is 48x64" in refused(frames)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (7, "video is a int"),
        ([], "holds no frame"),
        (np.zeros((4, 4, 3), np.uint8), r"shape (4, 4, 3)"),
        ([np.zeros((4, 4, 3), np.float32)], "frame 0: image array"),
        ("/nowhere/clip.mp4", "No such file"),
        ("https://example.org/clip.mp4", "nothing is fetched"),
        ("/dev/zero", "no regular file"),
        (b"", "no video of a known format"),
        (b"#EXTM3U\n/etc/passwd\n", "no video of a known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "no video of a known format"),
        (b"\x1a\x45\xdf\xa3" + bytes(200), "cannot be decoded"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(200), "cannot be decoded"),
    ],
)
def test_what_is_no_video_is_refused(source: Any, named: str) -> None:
    message = refused(source)
    assert named in message
    assert "Errno" not in message


def test_a_named_pipe_does_not_wait(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    assert "no regular file" in refused(pipe)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_video_bytes": 100}, "max_video_bytes"),
        ({"max_video_pixels": 48 * 64 - 1}, "max_video_pixels"),
        ({"max_image_side": 63}, "max_image_side"),
        ({"max_video_frames": 19}, "more than 19 frames"),
        ({"max_video_seconds": 1}, "max_video_seconds"),
        ({"video_formats": ("WEBM",)}, "is MP4; allowed are WEBM"),
        ({"video_codecs": ("vp9",)}, "encoded as 'h264'; allowed codecs are vp9"),
    ],
)
def test_limits_are_kept(limits: dict[str, Any], named: str) -> None:
    assert named in refused(encoded(moving(20)), Limits(**limits))
    assert not refused_or_none(encoded(moving(20)), Limits())


def refused_or_none(source: bytes, limits: Limits) -> str:
    try:
        levels(source, [0], limits)
    except VideoError as error:
        return str(error)
    return ""


def test_a_codec_that_is_not_listed_is_not_decoded() -> None:
    assert "encoded as 'ffv1'" in refused(encoded(moving(3), "matroska", "ffv1"))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))

    assert "holds no video" in refused(path)


def test_a_header_does_not_decide_the_number_of_frames() -> None:
    data = bytearray(encoded(moving(12), "avi", "mpeg4"))
    for chunk, field in ((b"avih", 16), (b"strh", 32)):
        at = data.index(chunk) + 8 + field
        assert int.from_bytes(data[at : at + 4], "little") == 12
        data[at : at + 4] = (5_000_000).to_bytes(4, "little")

    with open_video(bytes(data), Limits()) as clip:
        assert clip.total == 12
        assert len(list(clip.frames([0, 6, 11]))) == 3


def test_a_picture_that_grows_on_the_way_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream: Any = output.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for number, size in enumerate([(64, 48), (64, 48), (128, 96)]):
            picture = io.BytesIO()
            Image.new("RGB", size, "teal").save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream = stream
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, 10)
            output.mux(packet)

    assert levels(file.getvalue(), [0, 1])
    assert "frame 2 is 96x128 (height x width), the header says 48x64" in refused(file.getvalue())


def test_a_file_that_is_cut_off_says_so() -> None:
    # In Matroska packets follow their headers, so a part of the file can be read.
    data = encoded(moving(40, 240, 320), "matroska", "libx264", bf="0")

    with open_video(data[: len(data) // 2], Limits()) as clip:
        assert 0 < clip.total < 40
        assert len(list(clip.frames(range(clip.total)))) == clip.total


def test_packets_that_do_not_decode_are_missed() -> None:
    data = bytearray(encoded(moving(30, 96, 128), "avi", "mpeg4"))
    place = data.index(b"movi")
    while (place := data.find(b"00dc", place)) >= 0 and data.find(b"idx1") > place:
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        data[place + 8 : place + 8 + size] = bytes(size)
        place += 8 + size

    message = refused(bytes(data))

    assert "cannot be decoded" in message or "cut off" in message


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["h264 in mp4", "vp9 in webm", "mjpeg in avi"])
def test_damaged_files_end_in_an_error_or_in_frames(name: str, seed: int) -> None:
    container, codec = CONTAINERS[name]
    data = bytearray(encoded(moving(10), container, codec))
    random = np.random.default_rng(seed)
    for place in random.integers(4, len(data), 40):
        data[place] = random.integers(0, 256)

    try:
        with open_video(bytes(data), Limits()) as clip:
            shapes = {frame.shape for frame in clip.frames(range(min(10, clip.total)))}
    except (VideoError, OutOfMemoryError):
        # FFmpeg says that memory ran out where a header asks for an absurd amount.
        return
    assert shapes <= {(48, 64, 3)} or len(shapes) == 1


def test_a_codec_that_ffmpeg_has_no_decoder_for_is_refused() -> None:
    # Found by fuzzing: such a stream has no codec context at all.
    data = encoded(moving(5)).replace(b"avc1", b"zzzz")

    assert "no decoder for; allowed codecs are" in refused(data)


def test_a_folder_is_refused_and_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    assert "no regular file" in refused(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_the_kernel_is_refused() -> None:
    assert "cannot be read" in refused("/proc/self/mem")


def test_without_pyav_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(video_reader.importlib, "import_module", missing)

    with pytest.raises(DependencyError, match=r"pip install 'llava-edge\[video\]'"):
        levels(encoded(moving(2)), [0])
    assert levels(moving(2), [0])


def test_pyav_is_loaded_for_files_only() -> None:
    code = (
        "import sys, numpy as np\n"
        "from llava_edge.runtime import LlavaEdge\n"
        "from llava_edge.runtime.processing.video.video_reader import open_video\n"
        "from llava_edge.runtime.util.limits import Limits\n"
        "with open_video(np.zeros((2, 4, 4, 3), np.uint8), Limits()) as clip:\n"
        "    list(clip.frames([0, 1]))\n"
        "sys.exit('av' in sys.modules)\n"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
