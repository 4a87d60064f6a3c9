"""Images: whatever a caller gives becomes one RGB image within the limits, or an ``ImageError``.

Two ways in, as in the reference. A **file** (path or bytes) is transposed by its EXIF orientation
and loses its alpha channel; that is ``transformers.image_utils.load_image``. An **image in memory**
(Pillow image or array) is taken as it stands and laid on white where it is transparent; that is
``transformers.image_transforms.convert_to_rgb``, which a file passes through as well and which
still sees the transparent colour that some files name.

Everything after decoding is done in strips, so that an image costs what it was decoded to and the
RGB image that comes out, whatever lies between. Threads decode side by side: nothing here changes
the state of the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from llava_edge.profiles.errors import ImageError, OutOfMemoryError, RequestError
from llava_edge.profiles.memory.buffers import image_conversion_bytes, image_decoding_bytes
from llava_edge.profiles.sizes import format_above, format_bytes
from llava_edge.runtime.processing.images.high_bit_depth import Scaling, choose_scaling
from llava_edge.runtime.processing.images.image_file import (
    SWAPPING,
    Transpose,
    count_frames,
    load_pixels,
    open_image_file,
    orientation_of,
)
from llava_edge.runtime.util.allocation import require_free
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.image_formats import DEFAULT_FORMATS, recognise
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.safe_open import NotRegularError, open_plain

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
)

T = TypeVar("T")

_STRIP_PIXELS = 1 << 16
_ARRAY_STRIP_PIXELS = 1 << 14
"""Several arrays of doubles stand beside each other while values are scaled."""
_DEEP_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
_CLIP_HINT = 'For the reference\'s clipping: Limits(high_bit_depth="clip"), --high-bit-depth clip'


@dataclass(frozen=True)
class OpenedImage:
    """An image as it is looked at.

    Attributes:
        image: of mode RGB.
        notes: what was done to it that a user should know; goes into the answer.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def open_image(source: ImageSource | OpenedImage, limits: Limits | None = None) -> Image.Image:
    """The image alone of ``load_image``."""
    return load_image(source, limits).image


def load_image(source: ImageSource | OpenedImage, limits: Limits | None = None) -> OpenedImage:
    """Load an image as RGB; size and format are checked before anything is decoded.

    Args:
        source: path or content of an image file; Pillow image; array of shape (height, width),
            (height, width, 1), (height, width, 3) or (height, width, 4), uint8 or scaled by the
            rules of ``high_bit_depth``; or what this function returned.
        limits: bounds on what is taken in; the defaults of ``Limits`` if None.

    Returns:
        Image of mode RGB. A Pillow image that is RGB already is returned itself, not copied.

    Raises:
        ImageError: the source is missing, unreadable, damaged, of another format or type, or
            beyond a limit.
        OutOfMemoryError: the image is within the limits, yet memory did not suffice to decode it.
    """
    limits = Limits() if limits is None else limits
    if isinstance(source, OpenedImage):
        return source
    if isinstance(source, Image.Image):
        return _from_pillow(source, limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    # Nothing here keeps the content: it may be as large as the pixels.
    return _from_file(*_content(source, limits), limits)


def read_image_size(path: str | os.PathLike[str], limits: Limits | None = None) -> tuple[int, int]:
    """Height and width of an image file as it is looked at, without decoding its pixels.

    Raises:
        ImageError: as ``load_image``, so far as it can be told from the header.
    """
    limits = Limits() if limits is None else limits
    label, data = _content(path, limits)
    image = _decoded(label, lambda: _open_file(label, data, limits))
    if orientation_of(image) in SWAPPING:
        return image.width, image.height
    return image.height, image.width


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """RGB as the reference's ``convert_to_rgb`` makes it: transparency is laid on white.

    Returns the image itself if there is nothing to convert.
    """
    image.load()
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    return _in_strips(image, _laid_on_white)


def _laid_on_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _without_alpha(image: Image.Image) -> Image.Image:
    """What the reference makes of a file: RGB first, then the transparent colour laid on white."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Going to RGB forgets them anyway, but warns.
        del image.info["transparency"]
    return _laid_on_white(image.convert("RGB"))


def _in_strips(
    image: Image.Image,
    convert: Callable[[Image.Image], Image.Image],
    transpose: Transpose | None = None,
) -> Image.Image:
    """An RGB image, converted some rows at a time.

    Args:
        image: loaded.
        convert: makes RGB of some rows; pixels do not depend on each other.
        transpose: is applied to the whole.
    """
    width, height = image.size
    swapped = transpose in SWAPPING
    result = Image.new("RGB", (height, width) if swapped else (width, height), None)
    from_end = transpose in _FROM_END
    for top, bottom in _strips(height, width):
        strip = convert(image.crop((0, top, width, bottom)))
        if transpose is not None:
            strip = strip.transpose(transpose)
        start = height - bottom if from_end else top
        result.paste(strip, (start, 0) if swapped else (0, start))
    return result


_FROM_END = frozenset(
    {
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
    }
)
"""Transpositions after which the first row lies at the bottom or on the right."""


def _strips(height: int, width: int, pixels: int = _STRIP_PIXELS) -> Iterator[tuple[int, int]]:
    rows = max(1, pixels // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def path_label(path: str | os.PathLike[str]) -> str:
    """What messages call an image file."""
    return f"image {os.fspath(path)!r:.200}"


def _content(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, limits: Limits
) -> tuple[str, bytes]:
    """What messages call a file, and what is in it."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        label = f"image of {len(data)} bytes"
        _check_bytes(label, len(data), limits)
        return label, data
    if isinstance(source, (str, os.PathLike)):
        label = path_label(source)
        return label, _read_file(label, source, limits)
    raise ImageError(
        f"image is a {type(source).__name__}; give a path, bytes, a Pillow image or a uint8 array"
    )


def _read_file(label: str, path: str | os.PathLike[str], limits: Limits) -> bytes:
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            _check_bytes(label, os.fstat(file.fileno()).st_size, limits)
            # A file that grows while it is read stays within the limit as well.
            data: bytes | None = file.read(limits.max_image_bytes)
            if data is None:
                # Some of /proc is said to be regular, and has nothing yet.
                raise ImageError(f"{label} would have to be waited for; give an image file")
            return data
    except NotRegularError as error:
        raise ImageError(f"{label} is no regular file; give an image file") from error
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = " Images are files on this machine; nothing is fetched." if _is_url(path) else ""
        raise ImageError(f"{label} cannot be read: {reason}.{hint}") from error


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path) or os.fspath(path).startswith("data:")


def _open_file(label: str, data: bytes, limits: Limits) -> Any:
    """A file within the limits, opened, not decoded."""
    if not data:
        raise ImageError(f"{label}: no image at all, 0 bytes. Give the whole file.")
    kind = recognise(data)
    if kind is None:
        names = ", ".join(limits.image_formats)
        raise ImageError(
            f"{label}: no image: content starts with {bytes(data[:8])!r}. Give a file of a format "
            f"that is read: {names}."
        )
    if kind.format is None:
        raise ImageError(f"{label} is no image that is read, but {kind.name}. {kind.next_step}")
    if kind.format not in limits.image_formats:
        allowed = ", ".join(limits.image_formats)
        wanted = (*limits.image_formats, kind.format)
        hint = (
            ""
            if kind.format in DEFAULT_FORMATS
            else f" Allow it with --image-formats {','.join(wanted)} or "
            f"Limits(image_formats={wanted!r}), or convert the file to PNG."
        )
        raise ImageError(f"{label} is {kind.name}; allowed formats are {allowed}.{hint}")

    def check_size(height: int, width: int) -> None:
        _check_size(label, height, width, limits)

    try:
        image = open_image_file(kind.format, data, check_size)
        frames = count_frames(image)
    except ImageError as error:
        text = str(error)
        raise ImageError(text if text.startswith(label) else f"{label}: {text}") from error
    if frames > limits.max_image_frames:
        raise ImageError(
            f"{label} has more than {limits.max_image_frames} frames (max_image_frames). Give one "
            "frame, or raise the limit."
        )
    return image


def _from_file(label: str, data: bytes, limits: Limits) -> OpenedImage:
    image = _decoded(label, partial(_decode, label, data, limits))
    del data

    def convert() -> OpenedImage:
        transpose = orientation_of(image)
        if image.mode in _DEEP_MODES and limits.high_bit_depth == "scale":
            return _from_deep(label, image, transpose)
        if image.mode == "RGB" and transpose is None and image.info.get("transparency") is None:
            return OpenedImage(image)
        return OpenedImage(_in_strips(image, _without_alpha, transpose))

    return _decoded(label, convert)


def _decode(label: str, data: bytes, limits: Limits) -> Any:
    """A file's pixels as they are stored; the content is let go of."""
    image = _open_file(label, data, limits)
    needed = image_decoding_bytes(
        image.height * image.width,
        image.format,
        bands=len(image.getbands()),
        is_progressive=bool(image.info.get("progressive")),
    )
    require_free(needed, label)
    load_pixels(image)
    # Decoders may settle the size only now.
    _check_size(label, image.height, image.width, limits)
    return image


def _from_pillow(image: Image.Image, limits: Limits) -> OpenedImage:
    label = f"image of mode {image.mode}"
    _check_size(label, image.height, image.width, limits)
    if image.mode != "RGB":
        require_free(image_conversion_bytes(image.height * image.width), label)
    if image.mode in _DEEP_MODES and limits.high_bit_depth == "scale":
        return _decoded(label, lambda: _from_deep(label, image, None))
    return _decoded(label, lambda: OpenedImage(convert_to_rgb(image)))


def _from_deep(label: str, image: Image.Image, transpose: Transpose | None) -> OpenedImage:
    """Grey of more than 8 bits, scaled; the colour that a file calls transparent becomes white."""
    image.load()
    width, height = image.size

    def rows() -> Iterator[Array]:
        for top, bottom in _strips(height, width):
            yield np.asarray(image.crop((0, top, width, bottom)))

    scaling = choose_scaling(np.asarray(image.crop((0, 0, 1, 1))).dtype, rows)
    if scaling is None:
        return OpenedImage(_in_strips(image, _laid_on_white, transpose))
    clear = image.info.get("transparency")

    def scale(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        grey = scaling.apply(values)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")

    return OpenedImage(_in_strips(image, scale, transpose), _note(label, scaling))


def _note(label: str, scaling: Scaling) -> tuple[str, ...]:
    return (f"{label}: {scaling.note}. {_CLIP_HINT}",)


def _from_array(array: Array, limits: Limits) -> OpenedImage:
    shape = "x".join(map(str, array.shape))
    label = f"image array of shape {shape or '()'} and type {array.dtype}"
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if array.dtype.kind not in "biuf" or channels not in (1, 3, 4):
        raise ImageError(
            f"{label}; arrays must be uint8 of shape height x width, or height x width x 1, 3 or "
            "4; other numbers are scaled to it"
        )
    height, width = array.shape[:2]
    _check_size(label, height, width, limits)
    whole = array.reshape(height, width, channels)
    strips = list(_strips(height, width, _ARRAY_STRIP_PIXELS))
    scaling = None
    if limits.high_bit_depth == "scale":
        scaling = choose_scaling(array.dtype, lambda: (whole[top:end] for top, end in strips))
    if scaling is not None and channels == 4 and scaling.is_stretched:
        raise ImageError(
            f"{label}; {scaling.note.split(' were')[0]} leave open what its alpha channel means. "
            "Give values from 0 to 1, 0 to 255 or 0 to 65535."
        )

    require_free(image_conversion_bytes(height * width), label)

    def convert() -> OpenedImage:
        result = Image.new("RGB", (width, height), None)
        for top, bottom in strips:
            rows = whole[top:bottom]
            if scaling is not None:
                rows = scaling.apply(rows)
            elif rows.dtype != np.uint8:
                with np.errstate(invalid="ignore"):
                    rows = np.nan_to_num(np.clip(rows, 0, 255)).astype(np.uint8)
            if channels == 4:
                # Doubles and this order of operations, because the reference rounds them.
                alpha = rows[..., 3:4] / 255
                rows = np.round(alpha * rows[..., :3] + (1 - alpha) * 255).astype(np.uint8)
            rgb = np.broadcast_to(rows, (bottom - top, width, 3))
            result.paste(Image.fromarray(np.ascontiguousarray(rgb)), (0, top))
        return OpenedImage(result, _note(label, scaling) if scaling else ())

    return _decoded(label, convert)


def _check_bytes(label: str, size: int, limits: Limits) -> None:
    if size > limits.max_image_bytes:
        raise ImageError(
            f"{label} has {format_above(size, limits.max_image_bytes)}; at most "
            f"{format_bytes(limits.max_image_bytes)} are taken (max_image_bytes). "
            "Save it smaller or raise the limit."
        )


def _check_size(label: str, height: int, width: int, limits: Limits) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{label} is {height}x{width} (height x width) and has no pixel")
    faults = []
    if height * width > limits.max_image_pixels:
        faults.append(
            f"{height * width} pixels are more than {limits.max_image_pixels} (max_image_pixels, "
            "--max-image-pixels)"
        )
    if max(height, width) > limits.max_image_side:
        faults.append(f"a side is longer than {limits.max_image_side} (max_image_side)")
    if max(height, width) > limits.max_image_ratio * min(height, width):
        faults.append(
            f"the longer side is more than {limits.max_image_ratio} times the shorter "
            "(max_image_ratio)"
        )
    if faults:
        raise ImageError(
            f"{label} is {height}x{width} (height x width): {'; '.join(faults)}. "
            "Scale or crop it, or raise the limit."
        )


def _decoded(label: str, decode: Callable[[], T]) -> T:
    try:
        return decode()
    except (RequestError, OutOfMemoryError):
        raise
    except MemoryError as error:
        raise OutOfMemoryError(f"{label}: memory ran out while it was decoded") from error
    except Warning as warning:
        # The application's own filters made an error of it.
        raise ImageError(
            f"{label} is not decoded: Pillow warns {str(warning)[:200]!r}, and this process's "
            "filters of warnings make that an error. Let warnings of PIL pass, or save the file "
            "anew."
        ) from warning
    except Exception as error:
        # Decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error …
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error, UnidentifiedImageError) or "not identified" in reason:
            # Its own text names a buffer's address.
            reason = "its header is not understood"
        raise ImageError(
            f"{label} cannot be decoded: {reason}. The file may be cut off or damaged."
        ) from error
