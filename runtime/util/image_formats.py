"""Image file formats, recognised by content: those that are read, and the names of others.

What is not read is named for what it is, with the next step: a photo of a phone, a camera's raw
file, a video, the error page that a server sent in place of a picture.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

READABLE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")
"""Formats that can be read, in Pillow's names."""

DEFAULT_FORMATS = tuple(name for name in READABLE_FORMATS if name != "TIFF")
"""Formats that are read unless a caller asks for others. TIFF is a family of containers whose
library writes to stderr about damaged files; it is read where it is wanted."""

_CONVERT = "Convert it to JPEG or PNG."
_RENDER = "Render it to PNG."
_VIDEO = "Give it as the video (video=, --video), or give one of its frames as JPEG or PNG."
_HEIF = (
    "Convert it to JPEG, or open it in your application with Pillow and pillow-heif and give the "
    "Pillow image."
)
_DOWNLOAD = "Fetch the picture itself."
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        format: out of ``READABLE_FORMATS``; None if it is not read.
        name: for messages, with its article.
        next_step: what to do about a file that is not read.
    """

    format: str | None
    name: str
    next_step: str = _CONVERT


def recognise(data: bytes) -> FileKind | None:
    """Tell what a file is from its content.

    Args:
        data: the whole file.

    Returns:
        None for content of no known kind.
    """
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12])
    if data[:4] in _TIFF_MARKS:
        return _tiff(data)
    for magic, offset, kind in _MAGIC:
        if data.startswith(magic, offset):
            return kind
    return _text(data[:_HEAD_BYTES])


def _readable(name: str) -> FileKind:
    return FileKind(name, f"{'an' if name == 'AVIF' else 'a'} {name} file")


_RAW = FileKind(None, "a camera raw file", "Develop it to JPEG, PNG or TIFF.")
_MAGIC: tuple[tuple[bytes, int, FileKind], ...] = (
    (b"\xff\xd8\xff", 0, _readable("JPEG")),
    (b"\x89PNG\r\n\x1a\n", 0, _readable("PNG")),
    (b"GIF87a", 0, _readable("GIF")),
    (b"GIF89a", 0, _readable("GIF")),
    (b"BM", 0, _readable("BMP")),
    (b"\0\0\0\x0cJXL \r\n\x87\n", 0, FileKind(None, "a JPEG XL file")),
    (b"\xff\x0a", 0, FileKind(None, "a JPEG XL file")),
    (b"\0\0\0\x0cjP  \r\n\x87\n", 0, FileKind(None, "a JPEG 2000 file")),
    (b"\xff\x4f\xff\x51", 0, FileKind(None, "a JPEG 2000 file")),
    (b"\xff\xd8", 0, FileKind(None, "a damaged JPEG file", "Give the whole file.")),
    (b"8BPS", 0, FileKind(None, "a Photoshop file")),
    (b"gimp xcf", 0, FileKind(None, "a GIMP file")),
    (b"%PDF", 0, FileKind(None, "a PDF document", "Render the page that you want to PNG.")),
    (b"%!PS", 0, FileKind(None, "a PostScript file", _RENDER)),
    (b"\xc5\xd0\xd3\xc6", 0, FileKind(None, "a PostScript file", _RENDER)),
    (b"\0\0\1\0", 0, FileKind(None, "an icon file (ICO)")),
    # One that begins so with no cursor in it is a picture of true colour.
    (b"\0\0\2\0\0\0", 0, FileKind(None, "a Targa file (TGA)")),
    (b"\0\0\2\0", 0, FileKind(None, "a cursor file (CUR)")),
    (
        b"\0\5\x16\7",
        0,
        FileKind(
            None, "a resource file of macOS", "Give the file of its name without ._ in front."
        ),
    ),
    (b"icns", 0, FileKind(None, "an icon file (ICNS)")),
    (b"qoif", 0, FileKind(None, "a QOI file")),
    (b"v/1\x01", 0, FileKind(None, "an OpenEXR file", "Convert it to an 8-bit JPEG or PNG.")),
    (
        b"#?RADIANCE",
        0,
        FileKind(None, "a Radiance HDR file", "Convert it to an 8-bit JPEG or PNG."),
    ),
    (b"#?RGBE", 0, FileKind(None, "a Radiance HDR file", "Convert it to an 8-bit JPEG or PNG.")),
    (b"DDS ", 0, FileKind(None, "a DDS texture")),
    (b"\x01\xda", 0, FileKind(None, "an SGI file")),
    (b"\x0a\x05\x01", 0, FileKind(None, "a PCX file")),
    (b"\xd7\xcd\xc6\x9a", 0, FileKind(None, "a Windows metafile", _RENDER)),
    (b"DICM", 128, FileKind(None, "a DICOM file")),
    (b"SIMPLE  =", 0, FileKind(None, "a FITS file")),
    (b"FUJIFILMCCD-RAW", 0, _RAW),
    (b"IIRO", 0, _RAW),
    (b"IIRS", 0, _RAW),
    (b"MMOR", 0, _RAW),
    (b"IIU\0", 0, _RAW),
    (b"FOVb", 0, _RAW),
    (b"\x93NUMPY", 0, FileKind(None, "a NumPy file", "Load it with numpy and give the array.")),
    (b"\x1a\x45\xdf\xa3", 0, FileKind(None, "a video (Matroska or WebM)", _VIDEO)),
    (b"PK\x03\x04", 0, FileKind(None, "a ZIP archive", "Unpack it.")),
    (b"\x1f\x8b", 0, FileKind(None, "a gzip archive", "Unpack it.")),
    *(
        (b"P%d%c" % (number, space), 0, FileKind(None, "a PNM file"))
        for number in range(1, 8)
        for space in b"\n\r\t #"
    ),
    (
        b"version https://git-lfs.github.com/spec/v1",
        0,
        FileKind(None, "a Git LFS pointer, not the file itself", "Run git lfs pull."),
    ),
)
_RIFF = {
    b"WEBP": _readable("WEBP"),
    b"AVI ": FileKind(None, "a video (AVI)", _VIDEO),
    b"WAVE": FileKind(None, "a sound file", "Give a picture."),
}
_HEIC_BRANDS = frozenset({b"hei" + end for end in (b"c", b"x", b"m", b"s")}) | frozenset(
    {b"hev" + end for end in (b"c", b"x", b"m", b"s")}
)
_STILL_BRANDS = frozenset({b"mif1", b"mif2", b"msf1", b"miaf"})


def _iso_media(data: bytes) -> FileKind:
    """Files of boxes: HEIC, AVIF and videos differ by the brands that they list."""
    length = struct.unpack_from(">I", data)[0]
    listed = data[16 : min(length, 256)]
    brands = [data[8:12], *(listed[place : place + 4] for place in range(0, len(listed), 4))]
    # The first brand decides, except that a still picture may name its codec later only.
    for brand in brands if brands[0] in _STILL_BRANDS else brands[:1]:
        if brand in (b"avif", b"avis"):
            return _readable("AVIF")
        if brand in _HEIC_BRANDS:
            return FileKind(None, "a HEIC file", _HEIF)
    if brands[0] in _STILL_BRANDS:
        return FileKind(None, "a HEIF file", _HEIF)
    if brands[0] == b"crx ":
        return _RAW
    return FileKind(None, "a video (MP4 or MOV)", _VIDEO)


_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DNG_VERSION, _NEW_SUBFILE_TYPE, _SUB_DIRECTORIES = 50706, 254, 330


def _tiff(data: bytes) -> FileKind:
    """TIFF, or a camera's raw file: those are TIFFs whose first picture is a small preview."""
    if data[8:10] == b"CR":
        return _RAW
    order = "<" if data[:2] == b"II" else ">"
    tags: dict[int, int] = {}
    if 42 in data[2:4]:
        try:
            (start,) = struct.unpack_from(order + "I", data, 4)
            (count,) = struct.unpack_from(order + "H", data, start)
            for place in range(start + 2, start + 2 + 12 * count, 12):
                tag, _, _, value = struct.unpack_from(order + "HHII", data, place)
                tags[tag] = value
        except struct.error:
            # A damaged directory is found when the file is opened.
            pass
    is_preview = tags.get(_NEW_SUBFILE_TYPE) == 1 and _SUB_DIRECTORIES in tags
    return _RAW if _DNG_VERSION in tags or is_preview else _readable("TIFF")


def _text(head: bytes) -> FileKind | None:
    """What text stands where a picture was expected; None if it is none of the known kinds."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return FileKind(None, "an HTML page, probably an error page", _DOWNLOAD)
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!--")) and b"<svg" in start):
        return FileKind(None, "an SVG drawing", _RENDER)
    if start.startswith(b"<?xml"):
        return FileKind(None, "an XML document, probably an error message", _DOWNLOAD)
    if start.startswith((b'{"', b"{\n", b"{\r", b"{ ", b"{}", b"[{", b'["')):
        return FileKind(None, "a JSON document, probably an error message", _DOWNLOAD)
    if start.startswith(b"data:image/"):
        return FileKind(None, "a data URL", "Decode its base64 part and give the bytes.")
    return None
