"""Images: whatever a caller gives becomes one RGB image within the limits, or an ``ImageError``.

Two ways in, as in the reference. A **file** (path or bytes) is turned by its EXIF orientation and
loses its alpha channel; that is ``transformers.image_utils.load_image``. An **image in memory**
(Pillow image or array) is taken as it stands and laid on white where it is transparent; that is
``transformers.image_transforms.convert_to_rgb``, which a file passes through as well and which
still sees the transparent colour that some files name.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_edge.profiles.buffers import image_decoding_bytes
from llava_edge.profiles.errors import ImageError, OutOfMemoryError, RequestError
from llava_edge.runtime.allocation import allocate, require_free
from llava_edge.runtime.image_header import read_image_header
from llava_edge.runtime.libtiff import quiet_libtiff
from llava_edge.runtime.limits import Limits

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
)

T = TypeVar("T")

_ROWS_AT_ONCE = 256
_QUIET = threading.Lock()


def _renew_lock() -> None:
    """In a child of ``fork()``, where whoever held the lock may not exist."""
    global _QUIET
    _QUIET = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def open_image(source: ImageSource, limits: Limits | None = None) -> Image.Image:
    """Load an image as RGB; size and format are checked before anything is decoded.

    Args:
        source: path or content of an image file; Pillow image; uint8 array of shape (height,
            width), (height, width, 1), (height, width, 3) or (height, width, 4).
        limits: bounds on what is taken in; the defaults of ``Limits`` if None.

    Returns:
        Image of mode RGB. A Pillow image that is RGB already is returned itself, not copied.

    Raises:
        ImageError: the source is missing, unreadable, damaged, of another format or type, or
            beyond a limit.
        OutOfMemoryError: the image is within the limits, yet memory did not suffice to decode it.
    """
    limits = Limits() if limits is None else limits
    if isinstance(source, Image.Image):
        label = f"image of mode {source.mode}"
        _check_size(label, source.height, source.width, 1, limits)
        image = source
        if image.mode != "RGB":
            require_free(image_decoding_bytes(image.height * image.width), label)
        return _decoded(label, lambda: convert_to_rgb(image))
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        label = f"image of {len(data)} bytes"
        _check_bytes(label, len(data), limits)
    elif isinstance(source, (str, os.PathLike)):
        label = f"image {os.fspath(source)!r:.200}"
        data = _read_file(label, source, limits)
    else:
        raise ImageError(
            f"image is a {type(source).__name__}; give a path, bytes, a Pillow image or a uint8 "
            "array"
        )
    return _from_file(label, data, limits)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """RGB as the reference's ``convert_to_rgb`` makes it: transparency is laid on white.

    Returns the image itself if there is nothing to convert.
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _read_file(label: str, path: str | os.PathLike[str], limits: Limits) -> bytes:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{label} is no regular file; give an image file")
            _check_bytes(label, status.st_size, limits)
            # A file that grows while it is read stays within the limit as well.
            data: bytes | None = file.read(limits.max_image_bytes)
            if data is None:
                # Some of /proc is said to be regular, and has nothing yet.
                raise ImageError(f"{label} would have to be waited for; give an image file")
            return data
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = " Images are files on this machine; nothing is fetched." if _is_url(path) else ""
        raise ImageError(f"{label} cannot be read: {reason}.{hint}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK)


def _is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path) or os.fspath(path).startswith("data:")


def _from_file(label: str, data: bytes, limits: Limits) -> Image.Image:
    try:
        header = read_image_header(data, limits.max_image_frames)
    except ImageError as error:
        raise ImageError(f"{label}: {error}") from error.__cause__
    if header.format not in limits.image_formats:
        raise ImageError(
            f"{label} is a {header.format} file; allowed formats are "
            f"{', '.join(limits.image_formats)}"
        )
    _check_size(label, header.height, header.width, header.frames, limits)
    if header.tile_height * header.tile_width > limits.max_image_pixels:
        raise ImageError(
            f"{label} is stored in pieces of {header.tile_height}x{header.tile_width} pixels; at "
            f"most {limits.max_image_pixels} pixels are taken"
        )
    pixels = header.height * header.width
    require_free(image_decoding_bytes(pixels, webp=header.format == "WEBP"), label)

    if header.format == "TIFF":
        quiet_libtiff()

    def decode() -> Image.Image:
        image: Image.Image = Image.open(io.BytesIO(data), formats=(header.format,))
        # The library's word counts in the end: it is what memory is reserved by.
        _check_size(label, image.height, image.width, 1, limits)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            # Going to RGB forgets them anyway, but warns.
            del image.info["transparency"]
        if image.mode != "RGB":
            image = image.convert("RGB")
        return convert_to_rgb(image)

    return _decoded(label, decode)


def _from_array(array: NDArray[Any], limits: Limits) -> Image.Image:
    shape = "x".join(map(str, array.shape))
    label = f"image array of shape {shape or '()'} and type {array.dtype}"
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in (1, 3, 4):
        raise ImageError(
            f"{label}; arrays must be uint8 of shape height x width, or height x width x 1, 3 or 4"
        )
    height, width = array.shape[:2]
    _check_size(label, height, width, 1, limits)
    if channels == 1:
        return _decoded(label, lambda: Image.fromarray(array.reshape(height, width)).convert("RGB"))
    if channels == 3:
        return _decoded(label, lambda: Image.fromarray(np.ascontiguousarray(array)))

    def blend() -> Image.Image:
        rgb = allocate((height, width, 3), np.uint8, label)
        for start in range(0, height, _ROWS_AT_ONCE):
            rows = array[start : start + _ROWS_AT_ONCE]
            # Doubles and this order of operations, because the reference rounds them.
            alpha = rows[..., 3:4] / 255
            blended = alpha * rows[..., :3] + (1 - alpha) * 255
            rgb[start : start + _ROWS_AT_ONCE] = np.round(blended)
        return Image.fromarray(rgb)

    return _decoded(label, blend)


def _check_bytes(label: str, size: int, limits: Limits) -> None:
    if size > limits.max_image_bytes:
        raise ImageError(
            f"{label} has {size} bytes; at most {limits.max_image_bytes} are taken "
            "(max_image_bytes). Save it smaller or raise the limit."
        )


def _check_size(label: str, height: int, width: int, frames: int, limits: Limits) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{label} is {height}x{width} (height x width) and has no pixel")
    # Above Pillow's own bound Pillow would warn or refuse by itself; one rule says it for both.
    pixels = min(limits.max_image_pixels, Image.MAX_IMAGE_PIXELS or limits.max_image_pixels)
    faults = []
    if height * width > pixels:
        faults.append(f"{height * width} pixels are more than {pixels} (max_image_pixels)")
    if max(height, width) > limits.max_image_side:
        faults.append(f"a side is longer than {limits.max_image_side} (max_image_side)")
    if max(height, width) > limits.max_image_ratio * min(height, width):
        faults.append(
            f"the longer side is more than {limits.max_image_ratio} times the shorter "
            "(max_image_ratio)"
        )
    if frames > limits.max_image_frames:
        faults.append(f"it has more than {limits.max_image_frames} frames (max_image_frames)")
    if faults:
        raise ImageError(
            f"{label} is {height}x{width} (height x width): {'; '.join(faults)}. "
            "Scale or crop it, or raise the limit."
        )


def _decoded(label: str, decode: Callable[[], T]) -> T:
    try:
        with _QUIET, warnings.catch_warnings():
            # Of damage that it can live with Pillow warns, which would be whoever sends files
            # writing into an application's log. One thread at a time: the list of filters is the
            # whole process's.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return decode()
    except (RequestError, OutOfMemoryError):
        raise
    except MemoryError as error:
        raise OutOfMemoryError(f"{label}: memory ran out while it was decoded") from error
    except Exception as error:
        # Decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error …
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        if isinstance(error, UnidentifiedImageError):
            # Its own text names a buffer's address.
            reason = "its header is not understood"
        raise ImageError(
            f"{label} cannot be decoded: {reason}. The file may be cut off or damaged."
        ) from error
