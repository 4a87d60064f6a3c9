"""Faults in reading picture and video files, and of what shows in later pictures and turns only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageChops

from llava_edge.runtime import image_file, images, request_builder, video_processor, video_reader
from llava_edge.runtime.chat import Chat
from llava_edge.runtime.high_bit_depth import Scaling
from llava_edge.runtime.image_processor import ImageProcessor, ImageTiles
from llava_edge.runtime.prompt_embedder import PromptEmbedder
from llava_edge.runtime.request import Request
from llava_edge.runtime.request_builder import RequestBuilder
from llava_edge.runtime.session import Array
from llava_edge.runtime.video_reader import VideoReader
from llava_edge.runtime.vision import VisionEncoder
from tests.convert.verify.fault import Fault

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
    def apply(self: Scaling, rows: NDArray[Any]) -> _Pixels:
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
        return replace(request, pixel_values=tuple(same))

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
    real = Request.behind

    def behind(self: Request, position: int) -> Request:
        left = real(self, position)
        return replace(left, pixel_values=self.pixel_values[: len(left.pixel_values)])

    patch.setattr(Request, "behind", behind)


def _as_stored(patch: _Patch) -> None:
    patch.setattr(VideoReader, "_upright", lambda self, pixels, frame, tag: pixels)


def _matrix(change: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    real = video_reader.transformed
    return lambda patch: patch.setattr(
        video_reader, "transformed", lambda pixels, matrix: real(pixels, change(matrix))
    )


def _transposed(matrix: Any) -> Any:
    return matrix[0], matrix[2], matrix[1], matrix[3]


def _proper(matrix: Any) -> Any:
    """A mirroring without it: the determinant is above zero."""
    a, b, c, d = (int(each) for each in matrix)
    return (a, b, c, d) if a * d - b * c >= 0 else (-a, b, -c, d)


def _tag_forgotten(patch: _Patch) -> None:
    patch.setattr(video_reader, "tagged_matrix", lambda tag: (1, 0, 0, 1))


def _chosen(change: Callable[[int, int], Sequence[int]]) -> Callable[[_Patch], None]:
    """Other frames by the rule of the reference."""

    def plant(patch: _Patch) -> None:
        real = request_builder.choose_frames

        def choose(total: int, wanted: int, rule: Any = "reference") -> Sequence[int]:
            return change(total, wanted) if rule == "reference" else real(total, wanted, rule)

        patch.setattr(request_builder, "choose_frames", choose)

    return plant


def _by_linspace(total: int, wanted: int) -> Sequence[int]:
    return [int(i) for i in np.linspace(0, total - 1, wanted)]


def _one_later(total: int, wanted: int) -> Sequence[int]:
    return [min(i * total // wanted + 1, total - 1) for i in range(wanted)]


def _middles(total: int, wanted: int) -> Sequence[int]:
    return [(2 * i + 1) * total // (2 * wanted) for i in range(wanted)]


def _consecutive(total: int, wanted: int) -> Sequence[int]:
    return list(range(wanted))


def _rounded_linspace(patch: _Patch) -> None:
    """The original's rule, rounded and not cut."""
    real = request_builder.choose_frames

    def choose(total: int, wanted: int, rule: Any = "reference") -> Sequence[int]:
        if rule == "reference":
            return real(total, wanted, rule)
        return [round(float(at)) for at in np.linspace(0, total - 1, wanted)]

    patch.setattr(request_builder, "choose_frames", choose)


def _listed_as_stored(patch: _Patch) -> None:
    """Frames that are picture files are not rotated."""
    real = video_reader.open_image

    def opened(source: Any, limits: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(images, "orientation_of", lambda _: None)
            return real(source, limits)

    patch.setattr(video_reader, "open_image", opened)


def _fewer_by_default(patch: _Patch) -> None:
    real = RequestBuilder._most_frames

    def most(self: RequestBuilder, video: Any) -> int:
        found = real(self, video)
        return found if video.num_frames is not None else max(1, found // 2)

    patch.setattr(RequestBuilder, "_most_frames", most)


def _frames(change: Callable[[list[_Pixels]], list[_Pixels]]) -> Callable[[_Patch], None]:
    """What a file's chosen frames become."""

    def plant(patch: _Patch) -> None:
        real = VideoReader.frames

        def frames(self: VideoReader, numbers: Sequence[int]) -> Iterator[_Pixels]:
            yield from change(list(real(self, numbers)))

        patch.setattr(VideoReader, "frames", frames)

    return plant


def _last_again(found: list[_Pixels]) -> list[_Pixels]:
    return [*found[:-1], found[-2]]


def _narrow(found: list[_Pixels]) -> list[_Pixels]:
    return [(16 + frame.astype(np.float32) * 219 / 255).astype(np.uint8) for frame in found]


def _bilinear(patch: _Patch) -> None:
    def resize(frame: _Pixels, height: int, width: int, side: int) -> _Pixels:
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        top, left = (height - side) // 2, (width - side) // 2
        return np.asarray(image)[top : top + side, left : left + side]

    patch.setattr(video_processor, "resize_middle", resize)


def _cut_off_middle(patch: _Patch) -> None:
    """The square is cut one pixel to the right of the middle."""
    real = video_processor.resize_middle

    def resize(frame: _Pixels, height: int, width: int, side: int) -> _Pixels:
        return np.roll(real(frame, height, width, side), -1, axis=1)

    patch.setattr(video_processor, "resize_middle", resize)


def _picture(
    id_: str,
    wrong: str,
    plant: Callable[[_Patch], None],
    model: str = "qwen2",
    stage: str = "preprocessing",
) -> Fault:
    return Fault(id_, "picture files", wrong, "runtime", stage, plant, model=model)


def _video(id_: str, wrong: str, plant: Callable[[_Patch], None], model: str = "video") -> Fault:
    return Fault(id_, "video files", wrong, "runtime", "preprocessing", plant, model=model)


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
    _video("as stored", "frames are not rotated", _as_stored, "video int8"),
    _video("rotated back", "quarter turns go the other way", _matrix(_transposed)),
    _video("not mirrored", "frames are rotated and not mirrored", _matrix(_proper)),
    _video("tag forgotten", "the tag of older files is not seen", _tag_forgotten, "video int4"),
    _video("frames by linspace", "frames from the first to the last", _chosen(_by_linspace)),
    _video("frames one later", "each frame is the one after", _chosen(_one_later), "video int8"),
    _video("middle frames", "frames from the middle of each part", _chosen(_middles)),
    _video("first frames", "the first frames, one after another", _chosen(_consecutive)),
    _video("original's rule rounded", "its points are rounded, not cut", _rounded_linspace),
    _video("half of the frames", "unasked, half as many frames are seen", _fewer_by_default),
    _video("last frame repeated", "the last frame but one is seen twice", _frames(_last_again)),
    _video(
        "first frame alone",
        "all frames are the first",
        _frames(lambda found: found[:1] * len(found)),
        "video int4",
    ),
    _video("narrow range", "levels are left in the range of a video", _frames(_narrow)),
    _video(
        "frames as BGR",
        "frames are read as blue, green, red",
        _frames(lambda found: [frame[..., ::-1] for frame in found]),
    ),
    _video("frames bilinear", "frames are resized bilinearly", _bilinear),
    _video("frames cut off the middle", "a pixel to the right of it", _cut_off_middle),
)

AT_VERIFICATION: tuple[Fault, ...] = (
    _video(
        "listed frames as stored",
        "frames that are picture files are not rotated",
        _listed_as_stored,
    ),
)
"""Not looked at on a device: lists of frames are, and picture files, each by themselves."""
