"""Images to fuzz with: valid files of every format, damage to them, and files made to harm."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.fuzz.mutate import INTERESTING, mutated, png_chunks

MEDIUM = (120, 90)


def picture(mode: str = "RGB", size: tuple[int, int] = MEDIUM, step: int = 0) -> Image.Image:
    """Edges and colours; ``step`` moves them, for frames."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    pen = ImageDraw.Draw(image)
    pen.rectangle((5 + step, 8, 40 + step, 50), fill="royalblue")
    pen.ellipse((30, 20 + step, 90, 80 + step), fill="tomato")
    if mode == "P":
        return image.quantize(32)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(size).rotate(90))
    return image.convert(mode)


def saved(kind: str, image: Image.Image, **options: Any) -> bytes:
    """A file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animated(kind: str, **options: Any) -> bytes:
    """Five frames."""
    frames = [picture(step=4 * step) for step in range(5)]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:], **options)


@cache
def corpus() -> dict[str, bytes]:
    """Valid files by name; the name begins with the format."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8298] = 6, "maker", "nobody"
    profile = b"\x00" * 128 + b"profile" * 40
    files = {
        "JPEG": saved("JPEG", picture()),
        "JPEG progressive": saved("JPEG", picture(), progressive=True, quality=60),
        "JPEG grey": saved("JPEG", picture("L")),
        "JPEG CMYK": saved("JPEG", picture("CMYK")),
        "JPEG turned": saved("JPEG", picture(), exif=exif, icc_profile=profile, comment=b"c" * 99),
        "JPEG restarts": saved("JPEG", picture(), restart_marker_rows=1, subsampling="4:2:0"),
        "PNG": saved("PNG", picture()),
        "PNG palette": saved("PNG", picture("P"), transparency=bytes(range(0, 256, 8))),
        "PNG alpha": saved("PNG", picture("RGBA"), exif=exif, icc_profile=profile),
        "PNG grey alpha": saved("PNG", picture("LA")),
        "PNG bits": saved("PNG", picture("1")),
        "PNG 16": saved("PNG", Image.fromarray(np.arange(9000, dtype=np.uint16).reshape(90, 100))),
        "PNG animated": animated("PNG"),
        "WEBP": saved("WEBP", picture(), quality=70, exif=exif),
        "WEBP lossless": saved("WEBP", picture("RGBA"), lossless=True, icc_profile=profile),
        "WEBP animated": animated("WEBP", duration=40),
        "GIF": saved("GIF", picture("P"), transparency=3),
        "GIF animated": animated("GIF", duration=40, disposal=2),
        "GIF interlaced": saved("GIF", picture("L"), interlace=1, comment=b"text"),
        "BMP": saved("BMP", picture()),
        "BMP palette": saved("BMP", picture("P")),
        "BMP bits": saved("BMP", picture("1")),
        "BMP alpha": saved("BMP", picture("RGBA")),
        "BMP runs": _bmp_of_runs(),
        "AVIF": saved("AVIF", picture(), speed=10, exif=exif),
        "AVIF alpha": saved("AVIF", picture("RGBA"), speed=10, icc_profile=profile),
        "AVIF animated": animated("AVIF", speed=10),
        "TIFF": saved("TIFF", picture()),
        "TIFF frames": animated("TIFF", compression="tiff_lzw"),
        "TIFF alpha": saved("TIFF", picture("RGBA"), compression="tiff_deflate", exif=exif),
        "TIFF fax": saved("TIFF", picture("1"), compression="group4"),
        "TIFF packed": saved("TIFF", picture("P"), compression="packbits"),
        "TIFF jpeg": saved("TIFF", picture(), compression="jpeg"),
        "TIFF CMYK": saved("TIFF", picture("CMYK"), compression="tiff_adobe_deflate"),
        "TIFF float": saved("TIFF", picture("F")),
        "TIFF big": saved("TIFF", picture(), big_tiff=True),
        "TIFF large ends": _big_endian_tiff(),
        "TIFF tiles": _tiled_tiff(),
    }
    return files


def _bmp_of_runs() -> bytes:
    """8 x 8, compressed by runs of 8 bits, as Pillow reads and does not write."""
    rows = b"".join(bytes([8, 3 * row]) + b"\0\0" for row in range(8)) + b"\0\1"
    palette = b"".join(bytes([i, i, 255 - i, 0]) for i in range(256))
    start = 14 + 40 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return head + info + palette + rows


def _tiff(order: str, entries: list[tuple[int, int, int, int]], body: bytes) -> bytes:
    """One directory of short entries behind a body that begins at byte 8."""
    where = 8 + len(body)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HI", 42, where)
    data = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in sorted(entries):
        packed = struct.pack(
            order + ("HH" if kind == 3 and count == 1 else "I"),
            value,
            *[0] * (kind == 3 and count == 1),
        )
        data += struct.pack(order + "HHI", tag, kind, count) + packed
    return head + body + data + b"\0\0\0\0"


def _big_endian_tiff() -> bytes:
    entries = [(256, 3, 1, 40), (257, 3, 1, 30), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 30), (279, 4, 1, 1200)]
    return _tiff(">", entries, bytes(i % 251 for i in range(1200)))


def _tiled_tiff() -> bytes:
    entries = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(277, 3, 1, 1), (322, 3, 1, 16), (323, 3, 1, 16), (324, 4, 1, 8), (325, 4, 1, 256)]
    return _tiff("<", entries, bytes(range(256)))


def damaged_file(random: Random) -> tuple[str, bytes]:
    """A valid file, damaged anywhere or where its format's own structure lies."""
    name, data = random.choice(sorted(corpus().items()))
    others = list(corpus().values())
    inside = _INSIDE.get(name.split()[0])
    if inside is not None and random.random() < 0.45:
        data = inside(random, data)
        name += ", structure"
        if random.random() < 0.5:
            return name, data
    return name, mutated(random, data, others)


def _inside_png(random: Random, data: bytes) -> bytes:
    """Chunks damaged with sound checksums, so that decoders read on."""
    chunks = png_chunks(data)
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(chunks))
        kind, body = chunks[at]
        act = random.randrange(6)
        if act == 0:
            chunks[at] = kind, mutated(random, body, [body])
        elif act == 1:
            chunks.insert(at, random.choice(chunks))
        elif act == 2 and len(chunks) > 1:
            chunks.pop(at)
        elif act == 3:
            raw = zlib.compress(random.randbytes(30) + bytes(random.choice((0, 10**4, 10**7))))
            names = (b"zTXt", b"iCCP", b"iTXt", b"eXIf", b"tEXt", b"fdAT", b"IDAT")
            kind = random.choice(names)
            chunks.insert(at, (kind, b"k\0\0" + raw if kind != b"IDAT" else raw))
        elif act == 4:
            header = bytearray(chunks[0][1].ljust(13, b"\0"))
            place = random.choice((0, 4))
            struct.pack_into(">I", header, place, random.choice(INTERESTING) % (1 << 32))
            header[random.choice((8, 9, 10, 11, 12))] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 99))
            chunks[0] = b"IHDR", bytes(header)
        else:
            chunks[at] = random.choice(chunks)[0], body
    return data[:8] + b"".join(png_chunk(kind, body) for kind, body in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """With length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _inside_tiff(random: Random, data: bytes) -> bytes:
    """Entries of the first directory: tags, types, counts and values."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    changed = bytearray(data)
    form, size, head = ("HHQQ", 20, "Q") if big else ("HHII", 12, "H")
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + head, data, start)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = start + struct.calcsize(order + head) + size * random.randrange(count)
        fields = list(struct.unpack_from(order + form, changed, at))
        which = random.randrange(4)
        top = 16 if which < 2 else 64 if big else 32
        choices = (254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 320, 322, 323, 324, 330)
        pick: tuple[int, ...] = (choices, tuple(range(20)), INTERESTING, INTERESTING)[which]
        fields[which] = random.choice(pick) % (1 << top)
        struct.pack_into(order + form, changed, at, *fields)
    if random.random() < 0.2:
        # Directories in a ring.
        end = start + struct.calcsize(order + head) + size * count
        struct.pack_into(order + ("Q" if big else "I"), changed, end, start)
    return bytes(changed)


def _inside_jpeg(random: Random, data: bytes) -> bytes:
    """Segments: taken out, doubled, exchanged, lengthened."""
    parts, place = [], 2
    while data[place : place + 2] != b"\xff\xda":
        length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        parts.append(data[place : place + length])
        place += length
    rest = data[place:]
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(parts))
        act = random.randrange(5)
        if act == 0:
            parts.insert(at, random.choice(parts) * random.choice((1, 1, 200)))
        elif act == 1 and len(parts) > 1:
            parts.pop(at)
        elif act == 2:
            body = mutated(random, parts[at][4:], [rest])[:65000]
            parts[at] = parts[at][:2] + struct.pack(">H", len(body) + 2) + body
        elif act == 3:
            parts[at] = parts[at][:2] + struct.pack(">H", random.randrange(65536)) + parts[at][4:]
        else:
            rest = rest * 3 if random.random() < 0.5 else mutated(random, rest, [rest])
    return data[:2] + b"".join(parts) + rest


def _inside_webp(random: Random, data: bytes) -> bytes:
    """Chunks in the container, with its own size set right."""
    parts, place = [], 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        parts.append(data[place : place + 8 + length + (length & 1)])
        place += 8 + length + (length & 1)
    at = random.randrange(len(parts))
    act = random.randrange(4)
    if act == 0:
        parts.insert(at, random.choice(parts) * random.choice((1, 1, 300)))
    elif act == 1 and len(parts) > 1:
        parts.pop(at)
    elif act == 2:
        body = mutated(random, parts[at][8:], [data])
        parts[at] = parts[at][:4] + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)
    else:
        parts[at] = (
            parts[at][:4]
            + struct.pack("<I", random.choice(INTERESTING) % (1 << 32))
            + parts[at][8:]
        )
    body = b"".join(parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


_INSIDE: dict[str, Callable[[Random, bytes], bytes]] = {
    "PNG": _inside_png,
    "TIFF": _inside_tiff,
    "JPEG": _inside_jpeg,
    "WEBP": _inside_webp,
}


def _declaring(height: int, width: int, bits: int = 8, colour: int = 2, raw: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = zlib.compress(raw or bytes(1000), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", body)
        + png_chunk(b"IEND", b"")
    )


@cache
def harmful_files() -> dict[str, bytes]:
    """Files made to take memory or time, and files that are no pictures."""
    png, gif = corpus()["PNG"], corpus()["GIF animated"]
    chunks = png_chunks(png)
    text = b"k\0\0" + zlib.compress(bytes(200 << 20), 9)
    with_bomb = {
        kind: png[:8] + b"".join(png_chunk(*c) for c in (chunks[0], (kind, text), *chunks[1:]))
        for kind in (b"zTXt", b"iCCP", b"iTXt")
    }
    bmp = bytearray(corpus()["BMP"])
    struct.pack_into("<ii", bmp, 18, 100_000, 1)
    long_bmp = bytes(bmp)
    struct.pack_into("<ii", bmp, 18, -(1 << 31), -(1 << 31))
    return {
        "empty": b"",
        "one byte": b"\xff",
        "PNG that declares 50000x50000": _declaring(50_000, 50_000),
        "PNG of 8000x8000 in 8 KiB": _declaring(8_000, 8_000, 1, 0, bytes(8_000 * 1_001)),
        "PNG of 1400x1400 in a few KiB": _declaring(1_400, 1_400, 8, 2, bytes(1_400 * 4_201)),
        "PNG 1x100000": _declaring(1, 100_000, 8, 0, bytes(100_001)),
        "PNG 100000x1": _declaring(100_000, 1, 8, 0, bytes(200_000)),
        "PNG with 200 MiB behind its pixels": _declaring(10, 10, 8, 2, bytes(200 << 20)),
        **{f"PNG with 200 MiB in {kind!r}": data for kind, data in with_bomb.items()},
        "PNG of 300000 chunks": png[:33] + png_chunk(b"tEXt", b"a\0b") * 300_000 + png[33:],
        "BMP 1x100000": long_bmp,
        "BMP of -2^31": bytes(bmp),
        "GIF with 60000x60000 frames": gif.replace(struct.pack("<HH", *MEDIUM), b"\x60\xea" * 2),
        "GIF of 2000 frames": gif[:-1] + gif[gif.index(b"\x21\xf9") : -1] * 600 + b";",
        "GIF of tiny blocks": gif[:13] + b"\x21\xfe" + b"\x01a" * 3_000_000 + b"\0;",
        "JPEG of empty segments": b"\xff\xd8" + b"\xff\xe5\0\x02" * 500_000 + corpus()["JPEG"][2:],
        "JPEG of fill bytes": b"\xff\xd8" + b"\xff" * (8 << 20) + corpus()["JPEG"][2:],
        "JPEG of many scans": corpus()["JPEG progressive"][:-2] + _scans(3_000),
        "WEBP that declares 16384x16384": b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0"
        + b"\xff\x3f\0" * 2,
        "TIFF in strips without end": corpus()["TIFF"][:200],
        "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
        "SVG entities": b"<!DOCTYPE s [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><svg>&b;</svg>",
        "TrueType font": b"\x00\x01\x00\x00\x00\x0c\x00\x80\x00\x03\x00\x40" + bytes(500),
        "OpenType font": b"OTTO\x00\x0c\x00\x80\x00\x03\x00\x40" + bytes(500),
        "WOFF2 font": b"wOF2\x00\x01\x00\x00" + bytes(500),
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        "HTML": b"<html><img src='file:///etc/passwd'></html>",
        "gzip": b"\x1f\x8b\x08" + bytes(200),
        "zip": b"PK\x03\x04" + bytes(200),
        "ELF": b"\x7fELF" + bytes(500),
        "PSD": b"8BPS\0\x01" + bytes(500),
        "ICO": saved("ICO", picture()),
        "PPM": saved("PPM", picture()),
        "HEIC": b"\0\0\0\x18ftypheic" + bytes(500),
        "AVIF": b"\0\0\0\x18ftypavif" + bytes(500),
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(500),
        "FLI": b"\0\0\0\0\x12\xaf" + bytes(500),
        "DICOM": bytes(128) + b"DICM" + bytes(100),
        "XBM": b"#define a_width 9\n#define a_height 9\nstatic char a_bits[] = {0};\n",
    }


def _scans(count: int) -> bytes:
    data = corpus()["JPEG progressive"]
    last = data.rindex(b"\xff\xda")
    return data[last:-2] * count + b"\xff\xd9"


def odd_places(folder: Path) -> dict[str, Any]:
    """Paths that are no plain picture files; made below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: folder / name for name in ("pipe", "sparse", "holes", "folder", "ring", "text")}
    if not made["pipe"].exists():
        os.mkfifo(made["pipe"])
        for name, size in (("sparse", 1 << 40), ("holes", 100 << 20)):
            with made[name].open("wb") as file:
                file.truncate(size)
        made["folder"].mkdir()
        made["ring"].symlink_to(made["ring"])
        made["text"].write_text("no picture\n")
    devices = (
        "/dev/zero",
        "/dev/random",
        "/dev/full",
        "/proc/self/mem",
        "/proc/kmsg",
        "/dev/stdin",
    )
    addresses = ("http://127.0.0.1:9/a.png", "data:image/png;base64,AAAA", "file:///etc/passwd")
    names = ("", "\0", "a\0b", "x" * 10_000, "\udcff", "~", "../" * 2000)
    return {
        **made,
        **{p: p for p in devices},
        **{a: a for a in addresses},
        **{repr(n): n for n in names},
    }


def odd_objects(random: Random) -> tuple[str, Any]:
    """Something in memory that is no common image."""
    pixels = np.arange(60 * 50 * 3, dtype=np.uint8).reshape(60, 50, 3)
    modes = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
    choices: list[tuple[str, Callable[[], Any]]] = [
        ("reversed array", lambda: pixels[::-1, ::-1]),
        ("strided array", lambda: pixels[::2, ::3]),
        ("repeated array", lambda: np.broadcast_to(pixels[:1, :1], (700, 900, 3))),
        ("huge repeated array", lambda: np.broadcast_to(pixels[:1, :1], (1 << 16, 1 << 16, 3))),
        ("Fortran array", lambda: np.asfortranarray(pixels)),
        ("float array", lambda: pixels / 255),
        ("object array", lambda: np.array([[None]], object)),
        ("text array", lambda: np.array(["a"])),
        ("record array", lambda: np.zeros(3, [("a", "u1")])),
        (
            "no array",
            lambda: np.zeros(random.choice(((), (0,), (0, 0, 3), (5, 0, 3), (1, 1, 5))), np.uint8),
        ),
        ("6 axes", lambda: np.zeros((1,) * 6, np.uint8)),
        ("bool array", lambda: pixels > 9),
        ("masked array", lambda: np.ma.masked_array(pixels, pixels > 9)),
        ("matrix", lambda: np.ones((4, 4), np.uint8).view(np.ndarray)),
        ("1x100000 array", lambda: np.zeros((1, 100_000, 3), np.uint8)),
        ("100000x1 array", lambda: np.zeros((100_000, 1), np.uint8)),
        ("strided bytes", lambda: memoryview(corpus()["PNG"])[::2]),
        ("words", lambda: memoryview(np.zeros(9, np.uint32))),
        ("half a file", lambda: memoryview(corpus()["JPEG"])[: random.randrange(900)]),
        ("None", lambda: None),
        ("number", lambda: random.choice((0, -1, 1.5, float("nan"), 10**30, True))),
        ("list", lambda: [[corpus()["PNG"]]]),
        ("dict", lambda: {"url": "http://127.0.0.1:9/"}),
        ("open file", lambda: io.BytesIO(corpus()["PNG"])),
        ("class", lambda: Image.Image),
        ("image of no mode", lambda: Image.Image()),
        ("closed image", _closed),
        ("lazy damaged image", lambda: _lazy(random)),
        (
            "mode",
            lambda: Image.new(random.choice(modes), (31, 17), 7 if random.random() < 0.5 else 0),
        ),
        (
            "mode I",
            lambda: Image.new(random.choice(("I", "F", "I;16", "I;16B", "I;16L")), (31, 17)),
        ),
        ("long image", lambda: Image.new("1", random.choice(((1, 100_000), (100_000, 1), (0, 7))))),
        ("wrong transparency", lambda: _transparent(random)),
    ]
    name, make = random.choice(choices)
    return name, make()


def _closed() -> Image.Image:
    image = picture()
    image.close()
    return image


def _lazy(random: Random) -> Any:
    """An image that the caller opened and nobody has decoded yet; bytes where even that failed."""
    import warnings

    _, data = damaged_file(random)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))
    except Exception:
        return data


def _transparent(random: Random) -> Image.Image:
    image = picture(random.choice(("P", "L", "RGB", "1")))
    image.info["transparency"] = random.choice(
        (0, 999, -1, b"", b"\0" * 300, (1, 2), (1, 2, 3), "x")
    )
    return image
