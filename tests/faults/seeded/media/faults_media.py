"""Faults in reading picture files, and what shows in later pictures, tiles and turns only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops

from llava_edge.runtime.chat import Chat
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing import processor as request_builder
from llava_edge.runtime.processing.images import image_file
from llava_edge.runtime.processing.images import loading as images
from llava_edge.runtime.processing.images.high_bit_depth import Scaling
from llava_edge.runtime.processing.images.image_processor import ImageProcessor, ImageTiles
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.vision.encoder import VisionEncoder
from tests.faults.fault import Fault, with_tiles

_Patch = pytest.MonkeyPatch
_Transpose = Image.Transpose
_Pixels = NDArray[np.uint8]


def _orientations(**changes: Any) -> Callable[[_Patch], None]:
    """Other transpositions by number, ``n5=…``."""

    def plant(patch: _Patch) -> None:
        changed = {int(name[1:]): value for name, value in changes.items()}
        table = {**image_file._BY_ORIENTATION, **changed}
        patch.setattr(image_file, "_BY_ORIENTATION", table)

    return plant


def _orientation_where(applies: Callable[[Any], bool]) -> Callable[[_Patch], None]:
    """Only files of some kind are transposed."""

    def plant(patch: _Patch) -> None:
        real = images.orientation_of
        patch.setattr(
            images, "orientation_of", lambda image: real(image) if applies(image) else None
        )

    return plant


def _of_bytes_only(patch: _Patch) -> None:
    """What comes from the disk is not transposed."""
    real, orientation = images._from_file, images.orientation_of

    def from_file(label: str, *rest: Any) -> Any:
        by_path = not label.startswith("image of ")
        patch.setattr(images, "orientation_of", (lambda _: None) if by_path else orientation)
        return real(label, *rest)

    patch.setattr(images, "_from_file", from_file)


def _byte_order_ignored(patch: _Patch) -> None:
    little = {mark: order for mark, order in image_file._BYTE_ORDERS.items() if order == "<"}
    patch.setattr(image_file, "_BYTE_ORDERS", little)


def _no_raw_profile(patch: _Patch) -> None:
    real = images.orientation_of

    def orientation(image: Any) -> Any:
        image.info.pop("Raw profile type exif", None)
        return real(image)

    patch.setattr(images, "orientation_of", orientation)


def _no_xmp(patch: _Patch) -> None:
    real = images.orientation_of

    def orientation(image: Any) -> Any:
        image.info = {key: image.info[key] for key in image.info if "xmp" not in key}
        return real(image)

    patch.setattr(images, "orientation_of", orientation)


def _strips_in_order(patch: _Patch) -> None:
    patch.setattr(images, "_FROM_END", frozenset())


def _converted(convert: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    """What files become before anything is cut."""
    return lambda patch: patch.setattr(images, "_without_alpha", convert)


def _on_white(image: Any) -> Any:
    return images._laid_on_white(image)


def _on_black(image: Any) -> Any:
    if "A" not in image.getbands():
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")


def _palette_on_white(image: Any) -> Any:
    return images._laid_on_white(image) if image.mode == "P" else image.convert("RGB")


def _clear_colour_kept(image: Any) -> Any:
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _inverted_ink(image: Any) -> Any:
    return images._laid_on_white(
        ImageChops.invert(image).convert("RGB") if image.mode == "CMYK" else image.convert("RGB")
    )


def _indices_as_grey(image: Any) -> Any:
    if image.mode == "P":
        return Image.frombytes("L", image.size, image.tobytes()).convert("RGB")
    return image.convert("RGB")


def _red_of_grey(image: Any) -> Any:
    if image.mode in ("L", "LA"):
        grey = image.getchannel("L")
        return Image.merge("RGB", (grey, grey.point(lambda _: 0), grey.point(lambda _: 0)))
    return image.convert("RGB")


def _bgr_of_files(patch: _Patch) -> None:
    real = request_builder.load_image

    def load(source: Any, limits: Any) -> Any:
        opened = real(source, limits)
        if not isinstance(source, (bytes, str)) and not hasattr(source, "__fspath__"):
            return opened
        red, green, blue = opened.image.split()
        return replace(opened, image=Image.merge("RGB", (blue, green, red)))

    patch.setattr(request_builder, "load_image", load)


def _clipped(patch: _Patch) -> None:
    patch.setattr(images, "choose_scaling", lambda *_: None)


def _high_byte(patch: _Patch) -> None:
    def apply(self: Scaling, rows: Array) -> _Pixels:
        return (rows.astype(np.uint32) >> 8).astype(np.uint8)

    patch.setattr(Scaling, "apply", apply)


def _other_frame(patch: _Patch) -> None:
    """The second picture of an animated file."""
    real = images.load_pixels

    def load(image: Any) -> None:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(1)
        real(image)

    patch.setattr(images, "load_pixels", load)


def _half_decoded(patch: _Patch) -> None:
    """JPEG is decoded at half of its size, which is quicker, and enlarged."""
    real = images._decode

    def decode(label: str, data: bytes, limits: Any) -> Any:
        image = real(label, data, limits)
        if image.format != "JPEG":
            return image
        half = image.reduce(2).resize(image.size, Image.Resampling.NEAREST)
        half.info, half.format = image.info, image.format
        return half

    patch.setattr(images, "_decode", decode)


def _one_bit_dark(image: Any) -> Any:
    if image.mode == "1":
        return image.convert("L").point(lambda value: value // 255).convert("RGB")
    return image.convert("RGB")


def _first_tiles_again(patch: _Patch) -> None:
    """Every picture of a request has the tiles of its first."""
    real = RequestBuilder.assemble

    def assemble(self: RequestBuilder, pieces: Any, images: Sequence[Any], *rest: Any) -> Request:
        request = real(self, pieces, images, *rest)
        same = [request.pixel_values[0]] * len(images) if images else []
        return with_tiles(request, same)

    patch.setattr(RequestBuilder, "assemble", assemble)


def _pictures_of_first_turn(patch: _Patch) -> None:
    """A later turn shows what the first one showed."""
    real = Chat._request

    def request(self: Chat, messages: Sequence[Any], **options: Any) -> Request:
        shown = messages[0].images
        return real(
            self, [replace(m, images=shown) if m.images else m for m in messages], **options
        )

    patch.setattr(Chat, "_request", request)


def _pictures_reversed(patch: _Patch) -> None:
    """Pictures of one message stand in the other order."""
    real = RequestBuilder.assemble

    def assemble(self: RequestBuilder, pieces: Any, images: Sequence[Any], *rest: Any) -> Request:
        return real(self, pieces, images[::-1], *rest)

    patch.setattr(RequestBuilder, "assemble", assemble)


def _fifth_tile_black(patch: _Patch) -> None:
    real = ImageProcessor.preprocess

    def preprocess(self: ImageProcessor, image: Any) -> ImageTiles:
        tiles = real(self, image)
        tiles.pixel_values._pixels[4:] = 0  # type: ignore[union-attr]
        return tiles

    patch.setattr(ImageProcessor, "preprocess", preprocess)


def _fifth_tile_not_encoded(patch: _Patch) -> None:
    """The fifth tile of a request, of whichever picture, has the features of none."""
    features, encode = PromptEmbedder.features, VisionEncoder.encode
    done = 0

    def counted(self: PromptEmbedder, *arguments: Any) -> Any:
        nonlocal done
        done = 0
        return features(self, *arguments)

    def one_left_out(self: VisionEncoder, pixel_values: Array, out: Array) -> None:
        nonlocal done
        encode(self, pixel_values, out)
        if done <= 4 < done + len(out):
            out[4 - done] = 0
        done += len(out)

    patch.setattr(PromptEmbedder, "features", counted)
    patch.setattr(VisionEncoder, "encode", one_left_out)


def _second_picture_not_encoded(patch: _Patch) -> None:
    real = PromptEmbedder.features

    def features(self: PromptEmbedder, pixel_values: Sequence[Any], *rest: Any) -> Any:
        found = real(self, pixel_values, *rest)
        first = len(pixel_values[0]) if pixel_values else 0
        patches = self._dims.vision.num_patches
        if len(pixel_values) > 1:
            found[first * patches : 2 * first * patches] = found[: first * patches]
        return found

    patch.setattr(PromptEmbedder, "features", features)


def _rest_with_first_picture(patch: _Patch) -> None:
    """What is left of a prompt once a picture is cached keeps the pixels of the first one."""
    real = Request.without_prefix

    def without_prefix(self: Request, position: int) -> Request:
        left = real(self, position)
        return with_tiles(left, self.pixel_values[: len(left.pixel_values)])

    patch.setattr(Request, "without_prefix", without_prefix)


def _array_alpha_dropped(patch: _Patch) -> None:
    """Of an array with four channels the last is ignored."""
    real = images._from_array

    def opened(array: Array, *rest: Any) -> Any:
        return real(array[..., :3].copy() if array.shape[2:] == (4,) else array, *rest)

    patch.setattr(images, "_from_array", opened)


def _picture(
    id_: str,
    wrong: str,
    plant: Callable[[_Patch], None],
    model: str = "qwen2",
    stage: str = "preprocessing",
) -> Fault:
    return Fault(id_, "picture files", wrong, "runtime", stage, plant, model=model)


FAULTS: tuple[Fault, ...] = (
    _picture("EXIF ignored", "files are not rotated", _orientation_where(lambda _: False), "int8"),
    _picture(
        "5 and 7 exchanged",
        "orientations 5 and 7 are mirrored along the other diagonal",
        _orientations(n5=_Transpose.TRANSVERSE, n7=_Transpose.TRANSPOSE),
    ),
    _picture(
        "6 and 8 exchanged",
        "quarter turns go the other way",
        _orientations(n6=_Transpose.ROTATE_90, n8=_Transpose.ROTATE_270),
        "int4",
    ),
    _picture(
        "4 as 3",
        "a picture mirrored from top to bottom is rotated by half",
        _orientations(n4=_Transpose.ROTATE_180),
    ),
    _picture(
        "EXIF of JPEG alone",
        "PNG and WebP are not rotated",
        _orientation_where(lambda image: image.format == "JPEG"),
    ),
    _picture("EXIF of bytes alone", "files on the disk are not rotated", _of_bytes_only, "int8"),
    _picture(
        "big-endian EXIF ignored", "only little-endian EXIF is read", _byte_order_ignored, "int8"
    ),
    _picture("EXIF in a text ignored", "older PNG files are not rotated", _no_raw_profile),
    _picture("XMP ignored", "an orientation in XMP alone is not seen", _no_xmp),
    _picture(
        "strips in order", "strips of a rotated picture stand in the wrong order", _strips_in_order
    ),
    _picture("alpha on white", "files with alpha are laid on white", _converted(_on_white), "int4"),
    _picture("alpha on black", "files with alpha are laid on black", _converted(_on_black)),
    _picture(
        "palette on white",
        "clear entries of a palette become white where the reference forgets them",
        _converted(_palette_on_white),
        "int8",
    ),
    _picture(
        "clear colour kept",
        "a colour that a file calls clear stays where the reference makes it white",
        _converted(_clear_colour_kept),
    ),
    _picture("CMYK inverted", "ink is taken for light", _converted(_inverted_ink), "int4"),
    _picture(
        "indices as grey", "numbers of a palette are taken for grey", _converted(_indices_as_grey)
    ),
    _picture("grey as red", "grey stands in the first channel alone", _converted(_red_of_grey)),
    _picture("two levels dark", "white of one bit becomes 1, not 255", _converted(_one_bit_dark)),
    _picture("files as BGR", "files are read as blue, green, red", _bgr_of_files, "int8"),
    _picture("16 bits clipped", "16-bit values are cut off, not scaled", _clipped),
    _picture("high byte", "16-bit values lose their low byte, not rounded", _high_byte, "int4"),
    _picture("second frame", "the second picture of an animated file is seen", _other_frame),
    _picture("half size", "JPEG is decoded at half of its size", _half_decoded),
    _picture("first tiles again", "all pictures have the tiles of the first", _first_tiles_again),
    _picture(
        "pictures of the first turn",
        "a later turn shows the first one's",
        _pictures_of_first_turn,
        stage="prompt",
    ),
    _picture(
        "pictures reversed", "pictures change places", _pictures_reversed, "int8", stage="prompt"
    ),
    _picture("fifth tile black", "tiles from the fifth on are black", _fifth_tile_black),
    _picture(
        "fifth tile not encoded",
        "features of the fifth tile are zero",
        _fifth_tile_not_encoded,
        "int4",
        stage="tile_features",
    ),
    _picture(
        "second picture not encoded",
        "the second picture has features of the first",
        _second_picture_not_encoded,
        stage="packing",
    ),
    _picture(
        "rest with the first picture",
        "behind a cached picture its pixels are encoded again for the next",
        _rest_with_first_picture,
        stage="packing",
    ),
)

AT_VERIFICATION: tuple[Fault, ...] = (
    _picture("alpha of arrays", "clear parts of an array are opaque", _array_alpha_dropped),
)
"""Pictures in memory are compared at verification alone."""
