"""Image files are opened without decoding; files made to take time or memory are refused soon."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from llava_edge.profiles.errors import ImageError
from llava_edge.runtime.processing.images.loading import open_image, read_image_size
from llava_edge.runtime.util.image_formats import READABLE_FORMATS
from llava_edge.runtime.util.limits import Limits

EVERY = Limits(image_formats=READABLE_FORMATS)


def encoded(kind: str, mode: str = "RGB", height: int = 6, width: int = 9, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(data, EVERY)
    return str(caught.value)


def _exif(*entries: tuple[int, int, int, int], after: bytes = b"") -> bytes:
    """EXIF of entries of tag, type, number of values and value or place."""
    listed = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + listed + after + bytes(4)


_SIXTH = _exif((0x0112, 3, 1, 6 << 16))[4:]


@pytest.mark.parametrize("kind", READABLE_FORMATS)
def test_the_size_of_a_file_is_read_as_it_is_looked_at(kind: str, tmp_path: Any) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(kind))
    assert read_image_size(path, EVERY) == (6, 9)
    if kind not in ("GIF", "BMP"):
        exif = Image.Exif()
        exif[0x0112] = 6
        path.write_bytes(encoded(kind, exif=exif))
        assert read_image_size(path, EVERY) == (9, 6)


@pytest.mark.parametrize("orientation", [-3, 0, 9, 70_000])
@pytest.mark.parametrize("kind", [1, 3, 4, 9, 5, 2])
def test_orientations_that_mean_nothing_leave_an_image_upright(orientation: int, kind: int) -> None:
    value = struct.pack("<I", orientation % (1 << 32))
    body = struct.pack("<HHI", 0x0112, kind, 1) + value
    exif = b"Exif\0\0II" + struct.pack("<HIH", 42, 8, 1) + body
    assert open_image(encoded("PNG", exif=exif)).size == (9, 6)


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"MM\0*" + _SIXTH, id="sound"),
        pytest.param(b"MM*\0" + _SIXTH, id="number of TIFF in the wrong order"),
        pytest.param(b"MM\xff*" + _SIXTH, id="no mark of TIFF"),
        pytest.param(b"MM\0*" + _SIXTH[:-6], id="cut off in its value"),
        pytest.param(_exif((0x0112, 1, 1, 6 << 24)), id="a byte"),
        pytest.param(_exif((0x0112, 3, 2, 6 << 16)), id="two values"),
        pytest.param(_exif((0x0112, 4, 2, 26), after=b"\0\0\0\x06" * 2), id="two far values"),
        pytest.param(_exif((0x010F, 2, 6, 1 << 20), (0x0112, 3, 1, 6 << 16)), id="far beyond"),
        pytest.param(_exif((0x010F, 2, 9999, 8), (0x0112, 3, 1, 6 << 16)), id="too long"),
        pytest.param(_exif((0x010F, 99, 9, 8), (0x0112, 3, 1, 6 << 16)), id="unknown type before"),
        pytest.param(_exif((0x0112, 2, 4, 0), (0x0112, 3, 1, 6 << 16)), id="twice, text first"),
        pytest.param(_exif((0x0112, 3, 0, 0), (0x0112, 3, 1, 6 << 16)), id="twice, none first"),
        pytest.param(_exif((0x0112, 3, 1, 8 << 16), (0x0112, 3, 1, 6 << 16)), id="twice"),
    ],
)
def test_damaged_exif_rotates_a_picture_where_the_reference_does(exif: bytes) -> None:
    data = encoded("JPEG", exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert open_image(data).tobytes() == expected.tobytes()
    assert open_image(data).size == expected.size


def test_an_orientation_that_is_no_number_hides_the_one_of_xmp() -> None:
    xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
    data = encoded("JPEG", exif=b"Exif\0\0" + _exif((0x0112, 2, 4, 0)), xmp=xmp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert open_image(data).size == expected.size == (9, 6)


def test_a_bitmap_from_the_top_has_a_negative_height() -> None:
    data = bytearray(encoded("BMP"))
    struct.pack_into("<i", data, 22, -6)
    assert open_image(bytes(data)).size == (9, 6)


def test_the_first_gif_frame_may_be_larger_than_the_screen() -> None:
    data = bytearray(encoded("GIF", "L"))
    frame = data.index(b"\x2c", 13)
    struct.pack_into("<HHHH", data, frame + 1, 10, 20, 30_000, 20_000)
    assert "is 20020x30010 (height x width)" in refused(bytes(data))


def tiff(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


def test_a_tiff_stored_in_huge_pieces_is_refused() -> None:
    entries = [(256, 3, 1, 5), (257, 4, 1, 6), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(322, 4, 1, 20_000), (323, 4, 1, 20_000), (324, 4, 1, 8), (325, 4, 1, 9)]
    assert "is 20000x20000 (height x width)" in refused(tiff(entries))


def test_a_tiff_directory_that_points_at_itself_ends() -> None:
    data = encoded("TIFF")
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    ring = bytearray(data)
    struct.pack_into("<I", ring, start + 2 + 12 * count, start)
    started = time.process_time()
    assert open_image(bytes(ring), EVERY).size == (9, 6)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0",
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        b"\xff\xd8\xff\xc0\0",
        b"\xff\xd8" + b"\xff" * 200_000,
        b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0",
        b"BM\0",
        b"II*\0\xff\xff\xff\x7f",
        b"II+\0\x08\0\0\0" + b"\xff" * 8,
        b"\0\0\0\x18ftypavif" + bytes(100),
    ],
)
def test_a_header_that_is_not_whole_is_refused(data: bytes) -> None:
    assert refused(data).startswith(f"image of {len(data)} bytes")


MANY = 3_000_000


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * MANY,
        b"GIF89a" + bytes(7) + b"\x07" * MANY,
        encoded("GIF", "L")[:-1] + b"!\xfe" + b"\1x" * MANY,
        encoded("PNG")[:33] + (bytes(4) + b"tEXt" + bytes(4)) * MANY,
        b"\xff\xd8" + b"\xff\xfe\0\2" * MANY,
        b"\xff\xd8\xff\xe0" + b"\0\2a" * MANY,
        b"RIFF\0\0\0\0WEBP" + b"JUNK\0\0\0\0" * MANY,
    ],
    ids=["gif-blocks", "gif-bytes", "gif-tail", "png-chunks", "jpeg-segments", "jpeg", "webp"],
)
def test_millions_of_tiny_blocks_are_refused_soon(data: bytes) -> None:
    started = time.process_time()
    refused(data)
    assert time.process_time() - started < 5


def test_a_bitmap_of_many_runs_is_read_to_its_end() -> None:
    # Pillow reads runs byte by byte, more often than a header may be.
    height, width = 1_000, 1_800
    rows = (b"\x01\x07" * width + b"\0\0") * height + b"\0\1"
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    start = 54 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    assert open_image(head + info + palette + rows).getpixel((5, 5)) == (7, 7, 7)


def test_text_that_unpacks_to_much_is_refused_or_left_out() -> None:
    data = encoded("PNG")
    body = b"k\0\0" + zlib.compress(bytes(100 << 20), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    refused(data[:33] + chunk + data[33:])


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
    b"\0\0\0\x20ftypavif\0\0\0\0",
]


@settings(max_examples=400, deadline=None)
@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=200))
def test_any_bytes_after_a_magic_are_read_or_refused(magic: bytes, rest: bytes) -> None:
    try:
        image = open_image(
            magic + rest, Limits(image_formats=READABLE_FORMATS, max_image_pixels=9999)
        )
    except ImageError:
        return
    assert image.mode == "RGB"
