"""Anything given as an image becomes RGB or an ImageError; limits hold before decoding."""

from __future__ import annotations

import io
import os
import struct
import threading
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb as reference_convert_to_rgb
from transformers.image_utils import load_image as load_reference_image

from llava_edge.profiles.errors import ImageError, OutOfMemoryError
from llava_edge.profiles.memory.buffers import image_conversion_bytes
from llava_edge.runtime.processing.images import loading as images
from llava_edge.runtime.processing.images.loading import convert_to_rgb, open_image
from llava_edge.runtime.util.image_formats import READABLE_FORMATS
from llava_edge.runtime.util.limits import Limits


def picture(height: int = 40, width: int = 30, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng([height, width])
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_declares(height: int, width: int) -> bytes:
    """A PNG of a few bytes with a sound header and next to no pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I"])
def test_pillow_images_convert_as_the_reference_does(mode: str) -> None:
    image = picture(mode="LA").convert(mode) if mode == "PA" else picture(mode=mode)
    expected = reference_convert_to_rgb(image, return_numpy=True)
    assert np.array_equal(np.asarray(open_image(image)), expected)
    assert np.array_equal(np.asarray(convert_to_rgb(image)), expected)


def test_an_rgb_image_is_not_copied() -> None:
    image = picture()
    assert open_image(image) is image


def test_a_transparent_file_loses_alpha_while_an_image_is_laid_on_white() -> None:
    clear_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert open_image(encoded("PNG", clear_red)).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(clear_red).getpixel((0, 0)) == (255, 255, 255)


def test_sources_of_every_kind_give_the_same_pixels(tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "no-extension"
    path.write_bytes(encoded("PNG", image))
    content = path.read_bytes()
    for source in (path, str(path), content, bytearray(content), memoryview(content), image):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
    assert np.array_equal(np.asarray(open_image(np.asarray(image))), np.asarray(image))


def test_a_grey_array_becomes_three_equal_channels() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for array in (grey, grey[..., None]):
        assert np.array_equal(np.asarray(open_image(array)), np.repeat(grey[..., None], 3, -1))


def test_changing_the_array_later_does_not_change_the_image() -> None:
    array = np.zeros((4, 4, 3), np.uint8)
    image = open_image(array)
    array[:] = 200
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.complex64),
        np.zeros((4, 4, 3), object),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=["complex", "objects", "2-channels", "4-dim", "1-dim", "0-dim"],
)
def test_arrays_of_other_types_and_shapes_are_refused(array: Any) -> None:
    with pytest.raises(ImageError, match="arrays must be uint8 of shape height x width"):
        open_image(array)


@pytest.mark.parametrize(
    "source", [np.zeros((0, 5, 3), np.uint8), Image.new("RGB", (5, 0)), png_that_declares(0, 5)]
)
def test_an_image_without_pixels_is_refused(source: Any) -> None:
    with pytest.raises(ImageError, match="has no pixel"):
        open_image(source)


@pytest.mark.parametrize("source", [None, 7, ["a.png"], {"url": "x"}, io.BytesIO(b"x")])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match="give a path, bytes, a Pillow image or a uint8 array"):
        open_image(source)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png' cannot be read: No such file") as caught:
        open_image(tmp_path / "gone.png")
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("url", ["https://example.org/a.png", "data:image/png;base64,AAAA"])
def test_an_address_is_not_fetched(url: str) -> None:
    with pytest.raises(ImageError, match="nothing is fetched"):
        open_image(url)


def test_a_path_that_no_system_can_hold_is_refused() -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("a\0b.png")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("x" * 10_000)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is no regular file; give an image file"):
        open_image(tmp_path)


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="no regular file"):
        open_image(tmp_path / "pipe")


def test_a_device_is_refused() -> None:
    with pytest.raises(ImageError, match="no regular file"):
        open_image("/dev/zero")


def test_an_unreadable_text_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("this is no photograph\n")
    with pytest.raises(ImageError, match=r"photo\.jpg.*starts with b'this is "):
        open_image(path)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "SGI", "ICNS", "EPS"])
def test_formats_that_are_not_listed_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match=r"JPEG|to PNG"):
        open_image(encoded(kind))


def test_the_list_of_formats_can_be_shortened() -> None:
    limits = Limits(image_formats=("PNG", "WEBP"))
    assert open_image(encoded("PNG"), limits).size == (30, 40)
    with pytest.raises(ImageError, match="is a GIF file; allowed formats are PNG, WEBP"):
        open_image(encoded("GIF"), limits)


@pytest.mark.parametrize("kind", READABLE_FORMATS)
def test_a_file_cut_off_anywhere_is_refused(kind: str) -> None:
    data = encoded(kind)
    refused = 0
    for length in range(0, len(data) - 1, max(1, len(data) // 60)):
        try:
            open_image(data[:length], EVERY)
        except ImageError:
            refused += 1
    # The last bytes of some formats hold nothing that decoding needs.
    assert refused >= 57


@pytest.mark.parametrize(
    ("height", "width"),
    [(30_000, 30_000), (9_400, 9_400), (14_000, 14_000), (2**31 - 1, 2**31 - 1)],
)
def test_a_declared_size_is_refused_before_memory_is_taken(height: int, width: int) -> None:
    data = png_that_declares(height, width)
    tracemalloc.start()
    with pytest.raises(ImageError, match=f"is {height}x{width}.*max_image_pixels"):
        open_image(data)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def gif_whose_frame_is(height: int, width: int) -> bytes:
    data = bytearray(encoded("GIF", picture(mode="L")))
    frame = data.index(b"\x2c", 13 + 768)
    struct.pack_into("<HHHH", data, frame + 1, 0, 0, width, height)
    return bytes(data)


def bmp_that_declares(height: int, width: int) -> bytes:
    data = bytearray(encoded("BMP"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        gif_whose_frame_is(10_000, 10_000),
        bmp_that_declares(10_000, 10_000),
        b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\x0f\x27\0" * 2,
        encoded("JPEG").replace(
            b"\x11\x08" + struct.pack(">HH", 40, 30),
            b"\x11\x08" + struct.pack(">HH", 10_000, 10_000),
        ),
    ],
    ids=["gif-frame", "bmp", "webp", "jpeg"],
)
def test_sizes_between_pillows_warning_and_refusal_are_refused_without_a_warning(
    data: bytes,
) -> None:
    with pytest.raises(ImageError, match=r"is 10000x10000.*max_image_pixels"):
        open_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_pillows_own_bound_does_not_stand_in_the_way_of_a_raised_limit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(kind)
    # Pillow would warn of 1,200 pixels by the one bound and refuse them by the other. It always
    # refuses a WebP of more than twice the bound, while it opens the file.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000 if kind == "WEBP" else 500)
    assert open_image(data).size == (30, 40)


LIMITS = Limits(max_image_pixels=5_000, max_image_side=200, max_image_ratio=8)


@pytest.mark.parametrize(
    ("height", "width", "rules"),
    [
        (71, 71, ["5041 pixels", "max_image_pixels"]),
        (201, 24, ["longer than 200", "8 times"]),
        (24, 201, ["longer than 200", "8 times"]),
        (9, 73, ["8 times the shorter"]),
        (300, 30, ["max_image_pixels", "max_image_side", "max_image_ratio"]),
    ],
)
@pytest.mark.parametrize("form", ["file", "pillow", "array"])
def test_every_limit_that_is_passed_is_named(
    form: str, height: int, width: int, rules: list[str]
) -> None:
    image = picture(height, width)
    source = {"file": encoded("PNG", image), "pillow": image, "array": np.asarray(image)}[form]
    with pytest.raises(ImageError) as caught:
        open_image(source, LIMITS)
    for rule in [f"{height}x{width}", *rules]:
        assert rule in str(caught.value)


@pytest.mark.parametrize(("height", "width"), [(70, 71), (25, 200), (9, 72)])
def test_what_is_just_within_the_limits_is_taken(height: int, width: int) -> None:
    assert open_image(encoded("PNG", picture(height, width)), LIMITS).size == (width, height)


EVERY = Limits(image_formats=READABLE_FORMATS)


def animated(kind: str, frames: int) -> bytes:
    rest = [Image.new("RGB", (8, 8), (20 * step, 0, 0)) for step in range(1, frames)]
    return encoded(kind, Image.new("RGB", (8, 8), "blue"), save_all=True, append_images=rest)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_too_many_frames_are_refused_and_of_fewer_the_first_is_taken(kind: str) -> None:
    data = animated(kind, 12)
    with pytest.raises(ImageError, match=r"more than 11 frames \(max_image_frames\)"):
        open_image(data, replace(EVERY, max_image_frames=11))
    red, green, blue = np.asarray(open_image(data, replace(EVERY, max_image_frames=12)))[0, 0]
    assert blue > 240
    assert max(red, green) < 15


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match=r"huge\.png' has 1\.0 TiB; at most"):
        open_image(path)


def test_content_larger_than_the_limit_is_refused() -> None:
    data = encoded("PNG")
    with pytest.raises(ImageError, match="max_image_bytes"):
        open_image(data, Limits(max_image_bytes=len(data) - 1))
    assert open_image(data, Limits(max_image_bytes=len(data))).size == (30, 40)


def test_running_out_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(images, "convert_to_rgb", exhausted)
    with pytest.raises(OutOfMemoryError, match="image of mode L"):
        open_image(Image.new("L", (3, 3)))


def test_a_mode_that_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ImageError, match=r"mode La cannot be decoded: ValueError"):
        open_image(Image.new("La", (3, 3)))


def exif_with(entries: bytes, count: int, order: str = "<") -> bytes:
    """EXIF with a directory of those entries; the count may promise more."""
    mark = b"II" if order == "<" else b"MM"
    return b"Exif\0\0" + mark + struct.pack(order + "HIH", 42, 8, count) + entries


def entry(tag: int, kind: int, values: int, value: int, order: str = "<") -> bytes:
    packed = struct.pack(order + ("H2x" if kind == 3 else "I"), value)
    return struct.pack(order + "HHI", tag, kind, values) + packed


DAMAGED_EXIF = {
    "cut off": exif_with(entry(0x0112, 3, 1, 6) + entry(0x010F, 2, 500, 4000), 9),
    "points outside": exif_with(entry(0x010F, 2, 60_000, 9_999) + entry(0x0112, 3, 1, 6), 2),
    "too many values": exif_with(entry(0x011A, 3, 2, 6) + entry(0x0112, 3, 1, 6), 2),
}


def png_with_chunk(kind: bytes, body: bytes) -> bytes:
    data = encoded("PNG")
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + chunk + data[33:]


NOISY = {
    **{
        f"{kind}, EXIF {name}": encoded(kind, exif=exif)
        for kind in ("JPEG", "PNG", "WEBP")
        for name, exif in DAMAGED_EXIF.items()
    },
    "PNG, animation of no frame": png_with_chunk(b"acTL", bytes(8)),
    "PNG, palette with alpha values": encoded(
        "PNG", picture().quantize(20), transparency=bytes(range(20))
    ),
    "JPEG that announces more pictures": encoded("JPEG").replace(
        b"\xff\xdb", b"\xff\xe2\0\x10MPF\0" + b"II*\0\x08\0\0\0\0\0" + b"\xff\xdb", 1
    ),
}


@pytest.mark.parametrize("data", NOISY.values(), ids=NOISY)
@pytest.mark.parametrize("action", ["error", "always"])
def test_what_pillow_would_warn_of_is_read_without_a_warning(
    data: bytes, action: Literal["error", "always"]
) -> None:
    # Files could otherwise fill an application's log, or be refused by its filters.
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter(action)
        image = open_image(data)

    assert image.size in ((30, 40), (40, 30))
    assert heard == []


def test_the_damaged_files_above_do_make_pillow_warn() -> None:
    warned = 0
    for data in NOISY.values():
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        warned += bool(heard)

    assert warned >= 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", DAMAGED_EXIF)
def test_the_orientation_of_damaged_exif_is_that_of_the_reference(kind: str, name: str) -> None:
    data = encoded(kind, exif=DAMAGED_EXIF[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = load_reference_image(Image.open(io.BytesIO(data)))

    assert np.array_equal(np.asarray(open_image(data)), np.asarray(expected))


def test_an_error_that_the_applications_filters_make_of_a_warning_is_explained() -> None:
    data = encoded("TIFF").replace(
        struct.pack("<HHI", 284, 3, 1), struct.pack("<HHI", 284, 3, 60_000)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="this process's filters of warnings"):
            open_image(data, EVERY)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert open_image(data, EVERY).size == (30, 40)


def test_threads_decode_side_by_side_and_leave_the_filters_of_warnings_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = threading.Barrier(2, timeout=20)
    filters = list(warnings.filters)
    seen: list[bool] = []

    def meet(image: Image.Image) -> Image.Image:
        # Passes only where two threads stand here at once.
        both.wait()
        seen.append(list(warnings.filters) == filters)
        return laid_on_white(image)

    laid_on_white = images._laid_on_white
    monkeypatch.setattr(images, "_laid_on_white", meet)
    data = encoded("PNG", picture(mode="L"))
    results: list[Image.Image] = []
    threads = [threading.Thread(target=lambda: results.append(open_image(data))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 2
    assert seen == [True, True]
    assert list(warnings.filters) == filters


def test_an_image_that_the_caller_opened_is_decoded_without_a_warning() -> None:
    lazy = Image.open(io.BytesIO(encoded("PNG", picture().quantize(20), transparency=b"\0" * 20)))

    assert open_image(lazy).mode == "RGB"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/proc/self/mem", "cannot be read"), ("/proc/self/task", "no regular file")],
)
def test_files_of_the_kernel_are_refused(path: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(path)


def test_a_file_that_has_nothing_yet_is_refused_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # /proc/kmsg is such a one: regular by name.
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    monkeypatch.setattr(images, "open_plain", lambda path: reader)

    with pytest.raises(ImageError, match="would have to be waited for"):
        open_image("kmsg")
    os.close(writer)


SEEDS = [encoded(kind) for kind in READABLE_FORMATS]
SEEDS += [animated("GIF", 3), animated("WEBP", 3), encoded("PNG", picture(mode="P"))]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    places=st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_a_file_with_changed_bytes_is_opened_or_refused(
    data: bytes, places: list[tuple[int, int]]
) -> None:
    changed = bytearray(data)
    for place, value in places:
        # Half of the changes fall into the first bytes, where headers are.
        changed[place % (64 if place % 2 else len(changed))] = value
    try:
        image = open_image(bytes(changed), replace(EVERY, max_image_pixels=200_000))
    except ImageError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 4)])
def test_memory_for_an_array_is_asked_for_before_it_is_taken(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(images, "require_free", lambda nbytes, _: asked.append(nbytes))
    open_image(np.zeros(shape, np.uint8))
    assert asked == [image_conversion_bytes(20)]
