"""Image files opened by Pillow: size and frames are known, pixels are not decoded yet.

Pillow's own ``Image.open`` is not used: it guesses the format, and it warns and refuses by a bound
of the whole process, where ours is ``Limits``. The class of the format is called instead, on
content that was recognised, through a reader that stops at files of nothing but tiny pieces.

Pillow warns of damaged metadata, and an application may have made errors of warnings. So what it
would warn of is not given to it: EXIF is read here, for the orientation alone, and a broken
announcement of an animation is cut out. The filters of warnings belong to the whole process and are
never changed.

Sources: PNG (ISO/IEC 15948) and its APNG extension, GIF89a, TIFF 6.0 and Exif 2.3 (orientation);
Pillow 13 ``Image.getexif`` and ``ImageOps.exif_transpose``, which the reference calls.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from typing import Any

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from llava_edge.profiles.errors import ImageError

_MAX_CHUNKS = 100_000
_MAX_READS = 450_000
_MAX_GIF_READS = 1_500_000
"""A GIF of 128 MiB has half a million blocks, and each is read in two pieces."""
_MAX_FRAMES_DECLARED = 0x80000000

CheckSize = Callable[[int, int], None]
"""Is given height and width; raises where they are beyond a limit."""

Transpose = Image.Transpose
_BY_ORIENTATION = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SWAPPING = frozenset(_BY_ORIENTATION[number] for number in (5, 6, 7, 8))
"""Transpositions that exchange height and width."""


def open_image_file(format: str, data: bytes, check_size: CheckSize) -> Any:
    """Open a file without decoding its pixels.

    Args:
        format: out of ``READABLE_FORMATS``, as the content was recognised.
        data: the whole file.
        check_size: is called with every size that the file declares, at once.

    Returns:
        Image of Pillow, not loaded.

    Raises:
        ImageError: the header is damaged, or this Pillow does not read the format.
        Exception: what Pillow raises about a damaged header.
    """
    if format == "PNG":
        data = _checked_png(data, check_size)
    elif format == "GIF":
        # A frame that reaches over the screen makes Pillow check the size by its own bound.
        check_size(*_gif_size(data))
    elif format == "WEBP" and data[12:16] == b"VP8X" and len(data) >= 30:
        # The decoder takes memory for the canvas when it is opened.
        check_size(*(int.from_bytes(data[at : at + 3], "little") + 1 for at in (27, 24)))
    reader = _Reader(data)
    reader.reads_left = _MAX_GIF_READS if format == "GIF" else _MAX_READS
    image = _class_of(format)(reader)
    check_size(image.height, image.width)
    if format == "TIFF":
        # Memory goes by the tiles that it is stored in as well.
        check_size(*(_whole_number(image, tag) or 1 for tag in (323, 322)))
    return image


def count_frames(image: Any) -> int:
    """Frames of an opened file; none of them is decoded."""
    return int(getattr(image, "n_frames", 1))


def load_pixels(image: Any) -> None:
    """Decode an opened file, then let go of its content, which may be as large as its pixels."""
    if isinstance(image.fp, _Reader):
        # Size and pixels are bounded by now, and runs of a bitmap are read byte by byte.
        image.fp.reads_left = None
    image.load()
    image.fp = None


def orientation_of(image: Any) -> Transpose | None:
    """How a loaded image has to be transposed to stand upright; None if it does.

    Pillow transposes TIFF files itself.
    """
    if image.format == "TIFF":
        return None
    info = image.info
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:
        try:
            exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
        except ValueError:
            exif = None
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None:
        xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
        xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
        if match := re.search(rb'tiff:Orientation(="|>)([0-9])', xmp):
            found = int(match[2])
    return _BY_ORIENTATION.get(1 if found is None else found)


class _Reader(io.BytesIO):
    """Ends the reading of files that consist of tiny pieces, which would last minutes."""

    reads_left: int | None = None
    """None for as many as are wanted."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.reads_left is not None:
            self.reads_left -= 1
            if self.reads_left < 0:
                raise _damaged("it consists of too many tiny pieces")
        return super().read(size)


class _JpegFile(JpegImagePlugin.JpegImageFile):
    """A JPEG whose resolution is not looked up in EXIF: Pillow would read all of it, and warn."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _class_of(format: str) -> Callable[[io.BytesIO], Any]:
    if format == "AVIF":
        return _avif_class()
    return {
        # Several pictures in one file (MPO) are a JPEG and more after it; the first is read.
        "JPEG": _JpegFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
    }[format]


def _avif_class() -> Callable[[io.BytesIO], Any]:
    try:
        from PIL import AvifImagePlugin

        if AvifImagePlugin.SUPPORTED:
            return AvifImagePlugin.AvifImageFile
    except ImportError:
        # Pillow before 11.3.
        pass
    raise ImageError(
        "this Pillow does not read AVIF. Install Pillow 11.3 or later with AVIF, or convert the "
        "file to JPEG or PNG."
    )


def _damaged(what: str) -> ImageError:
    return ImageError(f"image is damaged or made to harm: {what}. Give another file.")


def _cut_off(format: str, data: bytes) -> ImageError:
    return ImageError(
        f"image is cut off: its {format} header goes on after {len(data)} bytes. Give the whole "
        "file."
    )


def _whole_number(image: Any, tag: int) -> int | None:
    value = image.tag_v2.get(tag)
    return value if isinstance(value, int) else None


def _checked_png(data: bytes, check_size: CheckSize) -> bytes:
    """The file without those announcements of an animation that Pillow would warn of."""
    if len(data) < 33:
        raise _cut_off("PNG", data)
    if data[12:16] != b"IHDR":
        raise _damaged("a PNG file starts without IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    check_size(height, width)
    position, announced, broken = 8, False, []
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            break
        if kind == b"acTL" and position + 20 <= len(data):
            (frames,) = struct.unpack_from(">I", data, position + 8)
            if announced or not 0 < frames <= _MAX_FRAMES_DECLARED:
                broken.append((position, position + 12 + length))
            announced = True
        position += 12 + length
    else:
        raise _damaged(f"more than {_MAX_CHUNKS} PNG chunks")
    for start, stop in reversed(broken):
        data = data[:start] + data[stop:]
    return data


def _gif_size(data: bytes) -> tuple[int, int]:
    """Height and width of the screen, which grows where the first frame reaches over it."""
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        for _ in range(_MAX_GIF_READS):
            kind = data[position]
            if kind == 0x3B:
                break
            if kind == 0x2C:
                left, top, *sides = struct.unpack_from("<HHHH", data, position + 1)
                width, height = max(width, left + sides[0]), max(height, top + sides[1])
                break
            # An extension: its label, then blocks up to an empty one.
            position += 2 if kind == 0x21 else 1
            while kind == 0x21 and data[position]:
                position += 1 + data[position]
            position += kind == 0x21
    except (struct.error, IndexError) as error:
        raise _cut_off("GIF", data) from error
    return height, width


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation that EXIF tells, 0 for one that is no whole number; None if it tells none.

    What Pillow passes over in a damaged directory is passed over, and where it stops, this stops.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        far = 0
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, offset = struct.unpack_from(order + "HHII", exif, place)
            size, at = values * _SIZES.get(kind, 0), place + 8
            if size > 4:
                far, at = far + size, offset
                if far > len(exif):
                    continue
                if at + size > len(exif):
                    break
            if tag == 0x0112 and size:
                letter = _INTEGERS.get(kind)
                return struct.unpack_from(order + letter, exif, at)[0] if letter else 0
    except struct.error:
        # Cut off before it tells any.
        pass
    return None


_BYTE_ORDERS = {b"II*\0": "<", b"II\0*": "<", b"MM\0*": ">", b"MM*\0": ">"}
"""By the mark of TIFF, also with its number in the wrong order."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Types of TIFF and the bytes of one value."""

_INTEGERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q"}
"""Types of TIFF that hold whole numbers, by ``struct``'s names. Bytes (1) are none to Pillow."""
