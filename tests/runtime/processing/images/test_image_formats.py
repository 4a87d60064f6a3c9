"""Files are recognised by content; what is not read is named, with the next step."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image, features

from llava_edge.profiles.errors import ImageError
from llava_edge.runtime.processing.images.loading import open_image
from llava_edge.runtime.util.image_formats import DEFAULT_FORMATS, READABLE_FORMATS, recognise
from llava_edge.runtime.util.limits import Limits


def brands(*names: bytes) -> bytes:
    body = b"ftyp" + names[0] + bytes(4) + b"".join(names[1:])
    return struct.pack(">I", 4 + len(body)) + body + bytes(300)


def tiff(*tags: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4)


OTHERS = {
    brands(b"heic", b"mif1", b"heic"): ("HEIC file", "pillow-heif"),
    brands(b"heix"): ("HEIC file", "pillow-heif"),
    brands(b"hevc", b"msf1"): ("HEIC file", "pillow-heif"),
    brands(b"mif1", b"miaf", b"heic"): ("HEIC file", "pillow-heif"),
    brands(b"msf1", b"hevc"): ("HEIC file", "pillow-heif"),
    brands(b"mif1", b"miaf"): ("HEIF file", "pillow-heif"),
    brands(b"isom", b"avc1"): ("video (MP4 or MOV)", "--video"),
    brands(b"qt  "): ("video (MP4 or MOV)", "--video"),
    brands(b"crx "): ("camera raw file", "Develop"),
    b"II*\0\x10\0\0\0CR\2\0" + bytes(99): ("camera raw file", "Develop"),
    tiff((254, 1), (330, 8), (271, 8)): ("camera raw file", "Develop"),
    tiff((256, 9), (50706, 1)): ("camera raw file", "Develop"),
    b"FUJIFILMCCD-RAW " + bytes(99): ("camera raw file", "Develop"),
    b"\x1a\x45\xdf\xa3" + bytes(99): ("video (Matroska or WebM)", "--video"),
    b"RIFF\0\0\0\0AVI " + bytes(99): ("video (AVI)", "--video"),
    b"\xff\x0a" + bytes(99): ("JPEG XL file", "Convert it"),
    b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99): ("JPEG XL file", "Convert it"),
    b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99): ("JPEG 2000 file", "Convert it"),
    b"\xff\x4f\xff\x51" + bytes(99): ("JPEG 2000 file", "Convert it"),
    b"8BPS\0\1" + bytes(99): ("Photoshop file", "Convert it"),
    b"%PDF-1.7\n": ("PDF document", "Render the page"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n": ("PostScript file", "Render it"),
    b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>': ("SVG drawing", "Render"),
    b"\xef\xbb\xbf  <svg></svg>": ("SVG drawing", "Render"),
    b"\0\0\1\0\1\0" + bytes(99): ("icon file (ICO)", "Convert it"),
    b"\0\0\2\0\1\0" + bytes(99): ("cursor file (CUR)", "Convert it"),
    b"\0\0\2" + bytes(9) + b"\x5a\0\x3c\0\x18\0" + bytes(99): ("Targa file (TGA)", "Convert it"),
    b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(99): ("resource file of macOS", "without ._"),
    b"qoif" + bytes(99): ("QOI file", "Convert it"),
    b"v/1\x01" + bytes(99): ("OpenEXR file", "8-bit"),
    b"#?RADIANCE\n": ("Radiance HDR file", "8-bit"),
    bytes(128) + b"DICM" + bytes(9): ("DICOM file", "Convert it"),
    b"P6\n3 3\n255\n" + bytes(27): ("PNM file", "Convert it"),
    b"\x93NUMPY\1\0": ("NumPy file", "give the array"),
    b"PK\x03\x04" + bytes(99): ("ZIP archive", "Unpack"),
    b"\n<!DOCTYPE html><html><title>404</title>": ("HTML page", "Fetch the picture"),
    b"<HTML><body>Forbidden": ("HTML page", "Fetch the picture"),
    b'{"error": "not found"}': ("JSON document", "Fetch the picture"),
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': ("XML document", "Fetch"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": ("Git LFS pointer", "lfs pull"),
    b"data:image/png;base64,AAAA": ("data URL", "base64"),
}


@pytest.mark.parametrize(
    "data", OTHERS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(OTHERS.values())]
)
def test_what_is_not_read_is_named_with_the_next_step(data: bytes) -> None:
    name, step = OTHERS[data]
    every = Limits(image_formats=READABLE_FORMATS)
    with pytest.raises(ImageError) as caught:
        open_image(data, every)
    assert name in str(caught.value)
    assert step in str(caught.value)


@pytest.mark.parametrize("data", [b"hello", bytes(200), b"{not json", b"xxxx\0\0\0\0WEBPVP8X"])
def test_content_of_no_known_kind_is_shown_by_its_first_bytes(data: bytes) -> None:
    assert recognise(data) is None
    with pytest.raises(ImageError, match="no image: content starts with b"):
        open_image(data)


def test_an_empty_file_is_named() -> None:
    with pytest.raises(ImageError, match="0 bytes"):
        open_image(b"")


@pytest.mark.parametrize("kind", READABLE_FORMATS)
def test_readable_formats_are_recognised(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    found = recognise(file.getvalue())
    assert found is not None
    assert found.format == kind


@pytest.mark.parametrize("listed", [(b"avif", b"mif1"), (b"avis",), (b"mif1", b"miaf", b"avif")])
def test_avif_is_recognised_by_any_of_its_brands(listed: tuple[bytes, ...]) -> None:
    found = recognise(brands(*listed))
    assert found is not None
    assert found.format == "AVIF"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_by_default() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(file, "AVIF")
    pixels = np.asarray(open_image(file.getvalue()), np.int16)
    assert np.abs(pixels - (0, 128, 128)).max() < 8


def test_where_pillow_has_no_avif_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
    monkeypatch.delattr("PIL.AvifImagePlugin", raising=False)
    with pytest.raises(ImageError, match=r"does not read AVIF\. Install Pillow 11"):
        open_image(brands(b"avif"))


def test_tiff_is_read_only_where_it_is_asked_for() -> None:
    file = io.BytesIO()
    Image.new("RGB", (5, 4)).save(file, "TIFF")
    with pytest.raises(ImageError, match=r"--image-formats [A-Z,]*,TIFF or Limits\(image_formats="):
        open_image(file.getvalue())
    allowed = Limits(image_formats=(*DEFAULT_FORMATS, "TIFF"))
    assert open_image(file.getvalue(), allowed).size == (5, 4)
