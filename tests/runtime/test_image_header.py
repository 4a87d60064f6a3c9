"""Headers are read as Pillow reads them, and nothing else than an ImageError comes of any bytes."""

from __future__ import annotations

import io
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_edge.profiles.errors import ImageError
from llava_edge.runtime.image_header import ImageHeader, read_image_header

SIZES = [(1, 1), (1, 300), (300, 1), (33, 70), (257, 256)]
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg-progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg-grey": ("JPEG", "L", {}),
    "png": ("PNG", "RGB", {}),
    "png-palette": ("PNG", "P", {}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "webp-lossy": ("WEBP", "RGB", {"quality": 50}),
    "webp-lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp-extended": ("WEBP", "RGBA", {"quality": 50, "icc_profile": b"icc"}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff-lzw": ("TIFF", "L", {"compression": "tiff_lzw"}),
    "tiff-big": ("TIFF", "RGB", {"big_tiff": True}),
}


def encoded(kind: str, mode: str, height: int, width: int, **options: Any) -> bytes:
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def animation(kind: str, frames: int) -> bytes:
    images = [Image.new("L", (12, 9), shade * 7 % 256).convert("RGB") for shade in range(frames)]
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(("height", "width"), SIZES, ids=[f"{h}x{w}" for h, w in SIZES])
@pytest.mark.parametrize("name", KINDS)
def test_size_and_format_are_what_pillow_reads(name: str, height: int, width: int) -> None:
    kind, mode, options = KINDS[name]
    header = read_image_header(encoded(kind, mode, height, width, **options), 10)
    assert (header.format, header.height, header.width) == (kind, height, width)
    assert header.frames == 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("frames", [2, 5, 9])
def test_frames_are_counted(kind: str, frames: int) -> None:
    assert read_image_header(animation(kind, frames), 100).frames == frames


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_are_counted_no_further_than_asked(kind: str) -> None:
    assert 4 <= read_image_header(animation(kind, 9), 3).frames <= 9


def test_a_bitmap_from_the_top_has_a_negative_height() -> None:
    data = bytearray(encoded("BMP", "RGB", 5, 7))
    struct.pack_into("<i", data, 22, -5)
    assert read_image_header(bytes(data), 1) == ImageHeader("BMP", 5, 7)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (7, 5)


def test_an_old_bitmap_header_has_short_sides() -> None:
    data = b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 40_000, 3, 1, 24)
    assert read_image_header(data, 1) == ImageHeader("BMP", 3, 40_000)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_the_largest_of_several_jpeg_frame_headers_counts(place: str) -> None:
    data = encoded("JPEG", "RGB", 8, 8)
    start = data.index(b"\xff\xc0") + (19 if place == "behind" else 0)
    second = b"\xff\xc0" + struct.pack(">HBHH", 8, 8, 60_000, 50_000) + b"\0"
    header = read_image_header(data[:start] + second + data[start:], 1)
    assert (header.height, header.width) == (60_000, 50_000)


def test_the_first_gif_frame_may_be_larger_than_the_screen() -> None:
    data = bytearray(encoded("GIF", "L", 4, 4))
    frame = data.index(b"\x2c", 13)
    struct.pack_into("<HHHH", data, frame + 1, 10, 20, 30_000, 20_000)
    header = read_image_header(bytes(data), 1)
    assert (header.height, header.width) == (20_020, 30_010)


def tiff(entries: list[tuple[int, int, int, int]]) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)


def test_tiff_pieces_are_reported() -> None:
    data = tiff([(256, 3, 1, 5), (257, 4, 1, 6), (322, 4, 1, 70_000), (323, 4, 1, 80_000)])
    assert read_image_header(data, 1) == ImageHeader("TIFF", 6, 5, 1, 80_000, 70_000)


@pytest.mark.parametrize("entry", [(256, 5, 1, 8), (257, 4, 2, 8), (256, 16, 1, 8)])
def test_a_tiff_side_of_an_odd_type_is_refused(entry: tuple[int, int, int, int]) -> None:
    with pytest.raises(ImageError, match="no single whole number"):
        read_image_header(tiff([entry]), 1)


def test_a_tiff_directory_that_points_at_itself_ends_the_count() -> None:
    data = bytearray(tiff([(256, 3, 1, 5), (257, 4, 1, 6)]))
    struct.pack_into("<I", data, len(data) - 4, 8)
    assert read_image_header(bytes(data), 50).frames == 51


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello, this is text\n" * 50, "starts with b'hello, t'"),
        (b"%PDF-1.7 and so on", "%PDF"),
        (b"GIF89a", "cut off: its GIF header"),
        (b"\x89PNG\r\n\x1a\n", "without IHDR"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", "cut off: its PNG header"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "without a frame header"),
        (b"\xff\xd8\xff\xc0\0", "cut off: its JPEG header"),
        (b"\xff\xd8" + bytes(70_000), "starts with"),
        (b"\xff\xd8" + b"\xff" * 200_000, "between JPEG segments"),
        (b"\xff\xd8\xff\xfe\0\2" + bytes(70_000) + b"\xff\xda", "between JPEG segments"),
        (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0", "cut off: its WEBP header"),
        (b"BM\0", "cut off: its BMP header"),
        (b"II*\0\xff\xff\xff\x7f", "cut off: its TIFF header"),
        (b"II+\0\x08\0\0\0" + b"\xff" * 8, "cut off: its TIFF header"),
        (b"xxxx\0\0\0\0WEBPVP8X", "starts with b'xxxx"),
    ],
)
def test_what_is_no_whole_image_header_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        read_image_header(data, 1)
    assert reason in str(caught.value)


MANY = 3_000_000


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * MANY,
        b"GIF89a" + bytes(7) + b"\x07" * MANY,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + (bytes(4) + b"tEXt" + bytes(4)) * MANY,
        b"\xff\xd8" + b"\xff\xfe\0\2" * MANY,
        b"\xff\xd8\xff\xe0" + b"\0\2a" * MANY,
        b"RIFF\0\0\0\0WEBP" + b"JUNK\0\0\0\0" * MANY,
    ],
    ids=["gif-blocks", "gif-bytes", "png-chunks", "jpeg-segments", "jpeg-junk", "webp-chunks"],
)
def test_millions_of_tiny_blocks_are_refused_soon(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ImageError, match=r"more than \d+"):
        read_image_header(data, 1000)
    assert time.process_time() - started < 5


MAGICS = [
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"RIFF\0\0\0\0WEBPVP8X",
    b"RIFF\0\0\0\0WEBPVP8L",
    b"BM",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
]


@settings(max_examples=400, deadline=None)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=200))
def test_any_bytes_behind_a_magic_are_read_or_refused(magic: bytes, rest: bytes) -> None:
    try:
        header = read_image_header(magic + rest, 5)
    except ImageError:
        return
    assert header.height >= 0
    assert header.width >= 0
    assert header.frames >= 1
