"""Pictures in memory that an artifact is verified with: modes of Pillow and types of arrays.

A user who has a picture already gives it as it is. Unlike a file it is not turned by its EXIF, and
what is transparent is laid on white.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from llava_edge.convert.verification.media.image_files import mosaic, oriented
from llava_edge.runtime.processing.images.loading import open_image
from llava_edge.runtime.util.arrays import Array

Pixels = Array
Picture = tuple[str, Image.Image | Pixels, Image.Image]
"""Name, what is given, and the picture of 8 bits that it stands for."""

_TURNED = 6


def memory_faults() -> tuple[int, list[str]]:
    """How many pictures were opened, and which of them have other pixels than the reference's."""
    count, faults = 0, []
    for name, given, shown in _pictures():
        count += 1
        try:
            ours: Pixels = np.asarray(open_image(given))
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        theirs: Any = convert_to_rgb(shown, return_numpy=True)
        if not np.array_equal(ours, theirs):
            faults.append(f"{name} has other pixels")
    return count, faults


def _pictures() -> Iterator[Picture]:
    colours, alpha = mosaic(), _alpha()
    clear = Image.fromarray(np.concatenate([colours, alpha], axis=2))
    plain, grey = Image.fromarray(colours), Image.fromarray(colours[..., 1].copy())
    yield from _of_pillow(plain, grey, clear)
    for kind, picture in (("grey", grey), ("colour", plain), ("transparent", clear)):
        yield from _arrays(kind, picture)


def _of_pillow(plain: Image.Image, grey: Image.Image, clear: Image.Image) -> Iterator[Picture]:
    for picture in (plain, grey, clear):
        yield f"a picture of mode {picture.mode}", picture, picture
    for source, modes in ((clear, ("LA", "PA")), (plain, ("P", "CMYK", "YCbCr")), (grey, ("1",))):
        for mode in modes:
            picture = source.convert("LA").convert("PA") if mode == "PA" else source.convert(mode)
            yield f"a picture of mode {mode}", picture, picture
    palette = plain.convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    yield "a palette with a clear colour", palette, palette
    turned = plain.copy()
    turned.info["exif"] = oriented(_TURNED).tobytes()
    yield "a picture with an orientation", turned, plain
    values: Pixels = np.asarray(grey)
    yield "a picture of mode I;16", Image.fromarray(values.astype(np.uint16) * 257), grey
    yield "a picture of mode F", Image.fromarray(values.astype(np.float32) / 255), grey


def _arrays(kind: str, picture: Image.Image) -> Iterator[Picture]:
    values: Pixels = np.asarray(picture)
    for what, array in (
        ("bytes", values),
        ("shares of one", values.astype(np.float32) / 255),
        ("16 bits", values.astype(np.uint16) * 257),
        ("numbers to 255", values.astype(np.float64)),
        ("bytes by column", np.asfortranarray(values)),
        ("every second column", np.repeat(values, 2, axis=1)[:, ::2]),
    ):
        yield f"an array, {kind}, {what}", array, picture
    if values.ndim == 2:
        yield f"an array, {kind}, one channel", values[..., None], picture
        yield f"an array, {kind}, of truth", values > 99, picture.point(lambda v: 255 * (v > 99))


def _alpha() -> Pixels:
    """From clear to solid over the columns: uint8 (height, width, 1)."""
    height, width = mosaic().shape[:2]
    row = np.linspace(0, 255, width).round().astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 1))
