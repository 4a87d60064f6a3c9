"""Picture files that an artifact is verified with: every format that is read, and what is in them.

Nearly all show one mosaic, so that a wrong orientation, colour or transparency shows. The pixels of
a ``portable`` file are the same on every machine: all formats but JPEG are lossless there, and JPEG
has a colour for each pixel. The others are what cameras write; they are compared where both sides
use the same Pillow.

Sources: PNG (ISO/IEC 15948), Exif 2.3 (orientation), Adobe TIFF 6.0 (tag 274).
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from llava_edge.runtime.util.arrays import Array

Pixels = Array

_SQUARE = 8
"""A block of JPEG."""
_SHAPE = (3, 5)
"""Squares downwards and across."""
_LARGE = 10
"""Times as large: 240 x 400 pixels are more than the runtime converts at once."""
_ORIENTATION = 274
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    "</rdf:RDF></x:xmpmeta>"
)


@dataclass(frozen=True)
class PictureFile:
    """One file.

    Attributes:
        name: in reports; its first word is the format, as ``image_formats`` calls it.
        data: the whole file.
        portable: whether every machine decodes it to the same pixels.
        scaled: where one channel has more than 8 bits, a file of the 8 bits that the runtime scales
            it to; told to clip, it reads the file as the reference does.
    """

    name: str
    data: bytes
    portable: bool = True
    scaled: bytes | None = None

    @property
    def format(self) -> str:
        """As ``image_formats`` calls it."""
        return self.name.split()[0].rstrip(",")


@cache
def picture_files() -> tuple[PictureFile, ...]:
    """Every file, the same bytes at each call."""
    return (*_jpeg(), *_png(), *_deep_png(), *_gif(), *_bmp(), *_webp(), *_avif(), *_tiff())


def mosaic(large: bool = False, seed: int = 0) -> Pixels:
    """Even squares, each of another colour: uint8 (height, width, 3)."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return _squares(generator.integers(0, 256, (*_SHAPE, 3), np.uint8), large)


def encoded(pixels: Pixels, kind: str, mode: str | None = None, **options: Any) -> bytes:
    """A file by Pillow."""
    image = Image.fromarray(pixels)
    image = image if mode is None else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(number: int) -> Image.Exif:
    """EXIF with nothing but an orientation."""
    exif = Image.Exif()
    exif[_ORIENTATION] = number
    return exif


def _squares(values: Pixels, large: bool = False) -> Pixels:
    side = _SQUARE * (_LARGE if large else 1)
    return np.repeat(np.repeat(values, side, axis=0), side, axis=1)


def _alpha(large: bool = False) -> Pixels:
    """Clear, nearly clear, nearly solid and solid squares, with colours below all of them."""
    levels = np.resize(np.array([0, 60, 190, 255, 254, 1, 128], np.uint8), _SHAPE)
    return _squares(levels[..., None], large)


def _with_alpha(large: bool = False) -> Pixels:
    return np.concatenate([mosaic(large), _alpha(large)], axis=2)


def _grey(large: bool = False) -> Pixels:
    return np.ascontiguousarray(mosaic(large)[..., 1])


def _textured() -> Pixels:
    """No two regions alike, as a camera sees them: (53, 70, 3)."""
    y, x = np.mgrid[0:53, 0:70]
    waves = [127 + 110 * np.sin(x / (5 + 3 * c) + y / (11 - 2 * c) + c) for c in range(3)]
    return np.stack(waves, -1).clip(0, 255).astype(np.uint8)


def _jpeg() -> Iterator[PictureFile]:
    exact: dict[str, Any] = {"quality": 100, "subsampling": 0, "optimize": True}
    for number in range(1, 9):
        data = encoded(mosaic(), "JPEG", exif=oriented(number), **exact)
        yield PictureFile(f"JPEG, EXIF orientation {number}", data)
    yield PictureFile(
        "JPEG, EXIF of big-endian numbers", encoded(mosaic(), "JPEG", exif=_big_endian(6), **exact)
    )
    # Every library of note computes the same inverse transform, to the bit.
    yield PictureFile("JPEG, textured", encoded(_textured(), "JPEG", **{**exact, "quality": 80}))
    yield PictureFile(
        "JPEG, progressive, orientation 6",
        encoded(_textured(), "JPEG", progressive=True, exif=oriented(6), **exact),
    )
    yield PictureFile("JPEG, stored as RGB", encoded(mosaic(), "JPEG", keep_rgb=True, **exact))
    yield PictureFile("JPEG, grey", encoded(_grey(), "JPEG", **exact))
    ink = np.concatenate([mosaic(seed=2), mosaic(seed=3)[..., :1] // 3], axis=2)
    cmyk = Image.frombytes("CMYK", (ink.shape[1], ink.shape[0]), ink.tobytes())
    for number in (1, 8):
        file = io.BytesIO()
        cmyk.save(file, "JPEG", exif=oriented(number), **exact)
        yield PictureFile(f"JPEG, CMYK, orientation {number}", file.getvalue())
    photo = encoded(_textured(), "JPEG", quality=70, exif=oriented(5))
    yield PictureFile("JPEG, 4:2:0, orientation 5", photo, portable=False)


def _png() -> Iterator[PictureFile]:
    for number in range(1, 9):
        data = encoded(mosaic(large=True), "PNG", exif=oriented(number))
        yield PictureFile(f"PNG, large, EXIF orientation {number}", data)
    yield PictureFile("PNG, large, alpha", encoded(_with_alpha(True), "PNG", exif=oriented(3)))
    yield PictureFile("PNG, alpha, orientation 7", encoded(_with_alpha(), "PNG", exif=oriented(7)))
    yield PictureFile("PNG, grey", encoded(_grey(), "PNG"))
    yield PictureFile("PNG, grey and alpha", encoded(_with_alpha(), "PNG", "LA"))
    yield PictureFile("PNG, two levels", encoded(_grey(), "PNG", "1"))
    yield PictureFile("PNG, palette", _indexed())
    yield PictureFile("PNG, palette of 4 bits", _indexed(bits=4))
    yield PictureFile("PNG, palette, one clear", _indexed(transparency=3))
    yield PictureFile("PNG, palette, alpha", _indexed(transparency=bytes(range(0, 256, 17))))
    clear = tuple(int(each) for each in mosaic()[0, 0])
    yield PictureFile("PNG, a clear colour", encoded(mosaic(), "PNG", transparency=clear))
    level = int(_grey()[0, 0])
    yield PictureFile("PNG, a clear grey", encoded(_grey(), "PNG", transparency=level))
    yield PictureFile("PNG, orientation 6 in XMP", _chunked(mosaic(), 8, 2, _xmp()))
    older = _chunked(mosaic(), 8, 2, _raw_profile(_big_endian(8)))
    yield PictureFile("PNG, EXIF in a text", older)
    frames = [Image.fromarray(mosaic(seed=each)) for each in (0, 5)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=100)
    yield PictureFile("PNG, animated", file.getvalue())


def _deep_png() -> Iterator[PictureFile]:
    """More than 8 bits a value: Pillow keeps them in one channel, and cuts them off in several."""
    grey = _grey(large=True).astype(np.uint16) * 200
    # Values that round up and down, and such as nothing but their low byte tells apart.
    grey += np.arange(grey.shape[1], dtype=np.uint16)[None] % 300
    scaled = np.rint(grey / 257).astype(np.uint8)
    for number in (1, 6):
        data, plain = (encoded(v, "PNG", exif=oriented(number)) for v in (grey, scaled))
        yield PictureFile(f"PNG, 16 bits of grey, orientation {number}", data, scaled=plain)
    several = np.concatenate([mosaic(), _alpha()], axis=2).astype(np.uint16) * 256 + 200
    yield PictureFile("PNG, 16 bits of colour", _chunked(several[..., :3], 16, 2))
    yield PictureFile("PNG, 16 bits of colour and alpha", _chunked(several, 16, 6))
    yield PictureFile("PNG, 16 bits of grey and alpha", _chunked(several[..., 2:], 16, 4))


def _gif() -> Iterator[PictureFile]:
    frames = [Image.fromarray(mosaic(seed=each)).convert("P") for each in (0, 5)]
    yield PictureFile("GIF, palette", _indexed("GIF"))
    yield PictureFile("GIF, one clear", _indexed("GIF", transparency=3))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    yield PictureFile("GIF, animated", file.getvalue())


def _bmp() -> Iterator[PictureFile]:
    yield PictureFile("BMP", encoded(mosaic(), "BMP"))
    yield PictureFile("BMP, palette", _indexed("BMP"))
    yield PictureFile("BMP, two levels", encoded(_grey(), "BMP", "1"))


def _webp() -> Iterator[PictureFile]:
    exact: dict[str, Any] = {"lossless": True, "exact": True}
    for number in (1, 6):
        data = encoded(mosaic(), "WEBP", exif=oriented(number), **exact)
        yield PictureFile(f"WEBP, orientation {number}", data)
    yield PictureFile("WEBP, alpha", encoded(_with_alpha(), "WEBP", **exact))
    frames = [Image.fromarray(mosaic(seed=each)) for each in (0, 5)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100, **exact)
    yield PictureFile("WEBP, animated", file.getvalue())
    yield PictureFile("WEBP, lossy", encoded(_textured(), "WEBP", quality=60), portable=False)


def _avif() -> Iterator[PictureFile]:
    """Only where this Pillow writes AVIF; its builds differ in how they make RGB."""
    try:
        for number in (1, 6):
            data = encoded(_textured(), "AVIF", quality=90, speed=10, exif=oriented(number))
            yield PictureFile(f"AVIF, orientation {number}", data, portable=False)
        alpha = np.dstack([_textured(), _textured()[..., :1]])
        data = encoded(alpha, "AVIF", quality=90, speed=10)
        yield PictureFile("AVIF, alpha", data, portable=False)
    except (KeyError, OSError, ValueError):
        return


def _tiff() -> Iterator[PictureFile]:
    for number in (1, 6):
        data = encoded(mosaic(), "TIFF", exif=oriented(number))
        yield PictureFile(f"TIFF, orientation {number}", data)
    shares = np.linspace(0, 1, _grey().size, dtype=np.float32).reshape(_grey().shape)
    plain = encoded(np.rint(shares * 255.0).astype(np.uint8), "PNG")
    yield PictureFile("TIFF, shares of white", encoded(shares, "TIFF"), scaled=plain)


def _indexed(kind: str = "PNG", **options: Any) -> bytes:
    """A file with a palette of 16 colours, each index somewhere in it."""
    rows, columns = _SHAPE
    indices = _squares(np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns))
    indices[-1, -1] = rows * columns
    generator = np.random.Generator(np.random.PCG64(4))
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(generator.permutation(256)[:48].astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _big_endian(number: int) -> bytes:
    """EXIF with nothing but an orientation, as cameras of that order write it."""
    entry = struct.pack(">HHIHH", _ORIENTATION, 3, 1, number, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def _raw_profile(exif: bytes) -> bytes:
    """EXIF as files had it before PNG knew any: a text of hexadecimal digits."""
    text = f"\nexif\n{len(exif):8d}\n{exif.hex()}\n"
    return _chunk(b"tEXt", b"Raw profile type exif\0" + text.encode())


def _xmp() -> bytes:
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP.encode()
    return _chunk(b"iTXt", text)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _chunked(pixels: Pixels, bits: int, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of what Pillow does not write itself: several channels of 16 bits, XMP."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = pixels.astype(">u2" if bits == 16 else np.uint8)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [_chunk(b"IHDR", header), extra, _chunk(b"IDAT", zlib.compress(body, 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + _chunk(b"IEND", b"")
