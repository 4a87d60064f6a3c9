"""ImageHeader: format, size and frame count of an image file, read from its bytes alone.

An image library is asked only after these numbers were found to be within the limits, so a file
cannot make it reserve memory for a size it merely declares, nor walk millions of tiny blocks. What
stands here is the least that tells the size; whether the rest of the file is sound is found out by
decoding it.

Sources: PNG (ISO/IEC 15948) and its APNG extension, JPEG (ITU-T T.81, annex B), GIF89a, the WebP
container (RFC 9649), the Windows bitmap header, TIFF 6.0 and BigTIFF.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from llava_edge.profiles.errors import ImageError

# Real files have thousands of blocks at most, even GIFs with their 255-byte ones stay below; files
# of nothing but tiny blocks would keep a decoder busy for minutes.
_MAX_BLOCKS = 1_000_000
_MAX_CHUNKS = 100_000
_MAX_JUNK = 65_536


@dataclass(frozen=True)
class ImageHeader:
    """What a file declares: Pillow's format name, sides in pixels, number of frames.

    ``frames`` stops counting at one more than was asked for. ``tile_height`` and ``tile_width``
    are the sides of the pieces a TIFF is stored in, 0 elsewhere.
    """

    format: str
    height: int
    width: int
    frames: int = 1
    tile_height: int = 0
    tile_width: int = 0


def read_image_header(data: bytes, max_frames: int) -> ImageHeader:
    """Read the header of an image file.

    Args:
        data: the whole file.
        max_frames: frames are counted up to one more than this.

    Raises:
        ImageError: the content is of no known format, or ends or contradicts itself in the header.
    """
    for magic, offset, reader in _READERS:
        if data.startswith(magic, offset) and (reader is not _read_webp or data[:4] == b"RIFF"):
            try:
                return reader(data, max_frames)
            except (struct.error, IndexError, OverflowError) as error:
                # OverflowError: an offset of 64 bits, farther than any file reaches.
                name = reader.__name__.removeprefix("_read_").upper()
                raise ImageError(
                    f"image is cut off: its {name} header goes on after {len(data)} bytes. "
                    "Give the whole file."
                ) from error
    start = bytes(data[:8])
    raise ImageError(
        f"{'no image at all, 0 bytes' if not data else f'no image: content starts with {start!r}'}."
        " Give a JPEG, PNG, WebP, GIF, BMP or TIFF file."
    )


def _damaged(what: str) -> ImageError:
    return ImageError(f"image is damaged or made to harm: {what}. Give another file.")


def _read_png(data: bytes, max_frames: int) -> ImageHeader:
    if data[12:16] != b"IHDR":
        raise _damaged("a PNG file starts without IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    frames, position = 1, 8
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"acTL":
            frames = max(frames, struct.unpack_from(">I", data, position + 8)[0])
        if kind == b"IEND":
            break
        position += 12 + length
    else:
        raise _damaged(f"more than {_MAX_CHUNKS} PNG chunks")
    return ImageHeader("PNG", height, width, frames)


def _read_jpeg(data: bytes, max_frames: int) -> ImageHeader:
    height = width = junk = 0
    found = False
    position = 2
    for _ in range(_MAX_CHUNKS):
        marker = data.find(b"\xff", position)
        start, marker = position, len(data) if marker < 0 else marker
        # Any number of FF may stand before a marker's own.
        while data[marker : marker + 2] == b"\xff\xff" and marker - start <= _MAX_JUNK:
            marker += 1
        junk += max(marker - start, 0)
        if junk > _MAX_JUNK:
            raise _damaged(f"more than {_MAX_JUNK} bytes between JPEG segments")
        marker += 1
        if marker >= len(data):
            break
        kind = data[marker]
        position = marker + 1
        if kind == 0xDA:
            break
        if kind in _JPEG_ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if kind in _JPEG_FRAMES:
            found = True
            # A decoder may take the last of several; the largest bounds them all.
            sides = struct.unpack_from(">HH", data, position + 3)
            height, width = max(height, sides[0]), max(width, sides[1])
        position += max(length, 2)
    else:
        raise _damaged(f"more than {_MAX_CHUNKS} JPEG segments")
    if not found:
        raise _damaged("a JPEG file without a frame header")
    return ImageHeader("JPEG", height, width)


# Start-of-frame markers: C0 to CF without the tables DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers without a length behind them: stuffing, TEM, RST0 to RST7, SOI, EOI.
_JPEG_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})


def _read_gif(data: bytes, max_frames: int) -> ImageHeader:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    frames = blocks = 0
    while position < len(data) and frames <= max_frames:
        kind = data[position]
        position += 1
        if kind == 0x3B:
            break
        if kind == 0x2C:
            left, top, frame_width, frame_height, flags = struct.unpack_from(
                "<HHHHB", data, position
            )
            if frames == 0:
                # The first frame may reach over the screen, which then grows.
                width, height = max(width, left + frame_width), max(height, top + frame_height)
            frames += 1
            position += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:
            position += 1
        else:
            blocks += 1
            if blocks > _MAX_BLOCKS:
                raise _damaged(f"more than {_MAX_BLOCKS} GIF blocks")
            continue
        while position < len(data):
            length = data[position]
            position += 1 + length
            blocks += 1
            if blocks > _MAX_BLOCKS:
                raise _damaged(f"more than {_MAX_BLOCKS} GIF blocks")
            if length == 0:
                break
    return ImageHeader("GIF", height, width, max(frames, 1))


def _read_webp(data: bytes, max_frames: int) -> ImageHeader:
    height = width = frames = 0
    position = 12
    for _ in range(_MAX_CHUNKS):
        if position + 8 > len(data) or frames > max_frames:
            break
        kind, length = struct.unpack_from("<4sI", data, position)
        body = position + 8
        sides = (0, 0)
        if kind == b"VP8X":
            sides = (_u24(data, body + 7) + 1, _u24(data, body + 4) + 1)
        elif kind == b"VP8 ":
            raw_width, raw_height = struct.unpack_from("<HH", data, body + 6)
            sides = (raw_height & 0x3FFF, raw_width & 0x3FFF)
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, body + 1)
            sides = ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
        elif kind == b"ANMF":
            frames += 1
        height, width = max(height, sides[0]), max(width, sides[1])
        position = body + length + (length & 1)
    else:
        raise _damaged(f"more than {_MAX_CHUNKS} WebP chunks")
    return ImageHeader("WEBP", height, width, max(frames, 1))


def _u24(data: bytes, position: int) -> int:
    low, high = struct.unpack_from("<HB", data, position)
    return int(low) | int(high) << 16


def _read_bmp(data: bytes, max_frames: int) -> ImageHeader:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    # A negative height says that rows run from the top.
    return ImageHeader("BMP", abs(height), abs(width))


def _read_tiff(data: bytes, max_frames: int) -> ImageHeader:
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    pointer, count_format, entry_size = ("Q", "Q", 20) if big else ("I", "H", 12)
    (position,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
    sides = dict.fromkeys(_TIFF_SIDES, 0)
    frames = 0
    while position and frames <= max_frames:
        (count,) = struct.unpack_from(order + count_format, data, position)
        position += struct.calcsize(order + count_format)
        if count > _MAX_CHUNKS:
            raise _damaged(f"a TIFF directory of {count} entries")
        if frames == 0:
            for entry in range(count):
                tag, value = _tiff_entry(data, position + entry * entry_size, order, big)
                if tag in sides:
                    sides[tag] = max(sides[tag], value)
        frames += 1
        (position,) = struct.unpack_from(order + pointer, data, position + count * entry_size)
    width, height, tile_width, tile_height = sides.values()
    return ImageHeader("TIFF", height, width, max(frames, 1), tile_height, tile_width)


# ImageWidth, ImageLength, TileWidth, TileLength.
_TIFF_SIDES = (256, 257, 322, 323)
# SHORT, LONG and LONG8: the types a side may have.
_TIFF_TYPES = {3: "H", 4: "I", 16: "Q"}


def _tiff_entry(data: bytes, position: int, order: str, big: bool) -> tuple[int, int]:
    tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, position)
    if tag not in _TIFF_SIDES:
        return tag, 0
    if kind not in _TIFF_TYPES or count != 1 or (kind == 16 and not big):
        raise _damaged(f"TIFF tag {tag} is no single whole number")
    value_at = position + (12 if big else 8)
    return tag, struct.unpack_from(order + _TIFF_TYPES[kind], data, value_at)[0]


_READERS: tuple[tuple[bytes, int, Callable[[bytes, int], ImageHeader]], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, _read_png),
    (b"\xff\xd8\xff", 0, _read_jpeg),
    (b"GIF87a", 0, _read_gif),
    (b"GIF89a", 0, _read_gif),
    (b"WEBP", 8, _read_webp),
    (b"BM", 0, _read_bmp),
    (b"II*\x00", 0, _read_tiff),
    (b"MM\x00*", 0, _read_tiff),
    # BigTIFF; Pillow reads it in this byte order only.
    (b"II+\x00", 0, _read_tiff),
)
