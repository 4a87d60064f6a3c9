"""Pixel values are bit-equal to the reference's PIL image processor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from llava_edge.profiles.errors import ImageError, RequestError
from llava_edge.profiles.models.anyres import grid_pinpoints
from llava_edge.runtime.artifact.manifest import ImageProcessing
from llava_edge.runtime.processing.images import loading as images
from llava_edge.runtime.processing.images.image_processor import MAX_CROP_RATIO, ImageProcessor
from llava_edge.runtime.processing.images.loading import open_image
from llava_edge.runtime.util.image_formats import READABLE_FORMATS
from llava_edge.runtime.util.limits import Limits

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def processing(
    tile: int, patch: int, pinpoints: tuple[tuple[int, int], ...], **changes: Any
) -> ImageProcessing:
    values = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "rescale_factor": 1 / 255, **changes}
    return ImageProcessing(tile, patch, pinpoints, **values)


EXACT = Limits(image_formats=READABLE_FORMATS, high_bit_depth="clip")
"""Everything is read, and pixels of more than 8 bits are clipped as the reference does."""


@pytest.fixture(autouse=True)
def many_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are converted some rows at a time; here so few that small ones have several strips."""
    monkeypatch.setattr(images, "_STRIP_PIXELS", 700)


STOCK = processing(336, 14, grid_pinpoints("2x2", 336))
ODD = processing(70, 14, ((210, 70), (70, 70), (140, 350), (70, 280), (210, 210)))
SMALL = processing(
    84,
    14,
    grid_pinpoints("2x6", 84),
    image_mean=(0.5, 0.25, 0.1),
    image_std=(0.5, 0.3, 0.7),
    rescale_factor=0.00392156862745098,
)
GEOMETRIES = {"stock336": STOCK, "tile70": ODD, "tile84": SMALL}


def reference_pixels(source: Any, values: ImageProcessing) -> Any:
    tile = values.tile_size
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(point) for point in values.image_grid_pinpoints],
        image_mean=list(values.image_mean),
        image_std=list(values.image_std),
        rescale_factor=values.rescale_factor,
    )
    layout = {"input_data_format": "channels_last"} if isinstance(source, np.ndarray) else {}
    return processor(source, return_tensors="np", **layout)["pixel_values"][0]


def assert_bit_equal(source: Any, reference_source: Any, values: ImageProcessing) -> None:
    ours = ImageProcessor(values).preprocess(open_image(source, EXACT))
    theirs = reference_pixels(reference_source, values)
    assert ours.pixel_values.dtype == np.float32 == theirs.dtype
    assert ours.pixel_values.shape == theirs.shape
    assert len(ours.pixel_values) == ours.layout.num_tiles
    assert np.array_equal(ours.pixel_values, theirs)


def reference_file(path: Path) -> Any:
    """The reference's loader; it is given an open file because it never closes one itself."""
    with Image.open(path) as image:
        return load_image(image)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Any:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng([seed, height, width]).integers(0, 256, shape, dtype=np.uint8)


SIZES = [
    (1, 1),
    (1, 700),
    (700, 1),
    (1, 1000),
    (2, 3),
    (10, 1000),
    (1000, 10),
    (69, 71),
    (70, 70),
    (83, 85),
    (84, 84),
    (200, 300),
    (335, 337),
    (336, 336),
    (337, 336),
    (337, 337),
    (400, 600),
    (600, 400),
    (672, 672),
    (673, 335),
    (899, 1024),
    (1024, 340),
    (1008, 337),
    (1080, 1920),
]


@pytest.mark.parametrize(("height", "width"), SIZES, ids=[f"{h}x{w}" for h, w in SIZES])
@pytest.mark.parametrize("values", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_pixels_are_bit_equal_at_every_shape(
    values: ImageProcessing, height: int, width: int
) -> None:
    image = Image.fromarray(noise(height, width))
    assert_bit_equal(image, image, values)


def palette_image(transparency: bytes | int | None) -> Image.Image:
    image = Image.fromarray(noise(150, 90)).quantize(40)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def image_of_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        deep = np.random.default_rng(3).integers(0, 65536, (131, 77), dtype=np.uint16)
        return Image.fromarray(deep)
    if mode == "I":
        return Image.fromarray(np.arange(-3000, 67_000, 7, dtype=np.int32).reshape(100, 100))
    if mode == "F":
        return Image.fromarray(np.linspace(-40, 300, 9_999, dtype=np.float32).reshape(99, 101))
    if mode in ("LA", "PA"):
        return Image.fromarray(noise(131, 77, 4)).convert("LA").convert(mode)
    if mode in ("RGBA", "RGBa", "CMYK"):
        raw = noise(131, 77, 4)
        return Image.frombytes(mode, (77, 131), raw.tobytes())
    return Image.fromarray(noise(131, 77)).convert(mode)


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")
DEEP_MODES = ("I", "F", "I;16")


@pytest.mark.parametrize("mode", MODES + DEEP_MODES)
@pytest.mark.parametrize("values", [STOCK, ODD], ids=["stock336", "tile70"])
def test_pillow_images_of_every_mode_are_bit_equal(values: ImageProcessing, mode: str) -> None:
    assert_bit_equal(image_of_mode(mode), image_of_mode(mode), values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_the_processor_itself_converts_other_modes(mode: str) -> None:
    ours = ImageProcessor(ODD).preprocess(image_of_mode(mode))
    assert np.array_equal(ours.pixel_values, reference_pixels(image_of_mode(mode), ODD))


@pytest.mark.parametrize(
    "transparency", [None, 3, bytes(range(0, 200, 5))], ids=["opaque", "one-colour", "alphas"]
)
def test_palettes_with_transparency_are_bit_equal(transparency: bytes | int | None) -> None:
    assert_bit_equal(palette_image(transparency), palette_image(transparency), ODD)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(5, 8), (70, 140), (301, 517)])
def test_arrays_are_bit_equal(height: int, width: int, channels: int) -> None:
    array = noise(height, width, channels)
    # The reference refuses arrays of two dimensions; a third of length 1 says the same.
    assert_bit_equal(array, array.reshape(height, width, channels), ODD)


@pytest.mark.parametrize("alpha", [0, 1, 127, 128, 254, 255])
def test_arrays_are_laid_on_white_as_the_reference_rounds_it(alpha: int) -> None:
    array = np.dstack([np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 9))] * 4)
    array[..., 3] = alpha
    assert_bit_equal(array, array, ODD)


def test_an_array_like_view_need_not_be_contiguous() -> None:
    view = noise(200, 300)[::-1, ::2]
    assert_bit_equal(view, np.ascontiguousarray(view), ODD)


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6

# (format, mode, options) that Pillow can write and the loader reads.
FILES: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "RGB", {"quality": 91}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "1", {}),
    ("PNG", "L", {}),
    ("PNG", "L", {"transparency": 7}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "P", {"transparency": 5}),
    ("PNG", "P", {"transparency": bytes(range(0, 250, 10))}),
    ("PNG", "RGB", {}),
    ("PNG", "RGB", {"transparency": (10, 20, 30)}),
    ("PNG", "RGBA", {}),
    ("PNG", "I;16", {}),
    ("PNG", "1", {"transparency": 0}),
    ("PNG", "L", {"transparency": 7, "exif": SIDEWAYS}),
    ("PNG", "LA", {"exif": SIDEWAYS}),
    ("PNG", "P", {"transparency": 5, "exif": SIDEWAYS}),
    ("PNG", "P", {"transparency": bytes(range(0, 250, 10)), "exif": SIDEWAYS}),
    ("PNG", "RGB", {"transparency": (10, 20, 30), "exif": SIDEWAYS}),
    ("PNG", "RGBA", {"exif": SIDEWAYS}),
    ("PNG", "I;16", {"exif": SIDEWAYS}),
    ("PNG", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (77, 131), "red")]}),
    ("JPEG", "CMYK", {"exif": SIDEWAYS}),
    ("JPEG", "CMYK", {"progressive": True}),
    ("JPEG", "RGB", {"progressive": True, "exif": SIDEWAYS}),
    ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (77, 131), "red")]}),
    ("WEBP", "RGBA", {"quality": 60, "exif": SIDEWAYS}),
    ("WEBP", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (77, 131), "red")]}),
    ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (77, 131))]}),
    ("AVIF", "RGB", {}),
    ("AVIF", "RGBA", {"exif": SIDEWAYS}),
    ("AVIF", "L", {}),
    ("BMP", "1", {}),
    ("BMP", "RGBA", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGB", {"quality": 60}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("GIF", "L", {}),
    ("GIF", "P", {}),
    ("GIF", "P", {"transparency": 5}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {}),
    ("TIFF", "F", {}),
    ("TIFF", "I;16", {}),
    ("TIFF", "RGBA", {}),
    ("TIFF", "LAB", {}),
    ("TIFF", "YCbCr", {}),
    ("TIFF", "I", {}),
    ("TIFF", "RGB", {"exif": SIDEWAYS}),
    ("TIFF", "P", {"compression": "packbits", "exif": SIDEWAYS}),
]


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    FILES,
    ids=[f"{kind}-{mode}-{' '.join(options)}" for kind, mode, options in FILES],
)
# The reference warns where it drops a palette's alpha values; the loader does not.
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_files_are_bit_equal_by_path_and_by_content(
    tmp_path: Path, kind: str, mode: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "image.bin"
    image_of_mode(mode).save(path, kind, **options)
    for source in (path, str(path), path.read_bytes()):
        assert_bit_equal(source, reference_file(path), ODD)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_files_are_turned_by_their_exif_orientation(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    Image.fromarray(noise(97, 211)).save(path, kind, exif=exif)
    assert_bit_equal(path, reference_file(path), SMALL)
    assert_bit_equal(path.read_bytes(), reference_file(path), SMALL)
    turned = open_image(path, EXACT)
    assert turned.size == ((97, 211) if orientation > 4 else (211, 97))


def test_a_pillow_image_keeps_its_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 90)).save(buffer, "JPEG", exif=exif)
    image = Image.open(buffer)
    assert open_image(image).size == (90, 40)
    assert_bit_equal(Image.open(io.BytesIO(buffer.getvalue())), image, ODD)


def test_base_grid_is_the_squashed_thumbnail() -> None:
    image = Image.fromarray(noise(123, 457))
    tiles = ImageProcessor(processing(70, 14, ())).preprocess(image)
    assert tiles.pixel_values.shape == (1, 3, 70, 70)
    assert np.array_equal(tiles.pixel_values[0], reference_pixels(image, ODD)[0])


def test_padding_is_black_before_normalisation() -> None:
    tiles = ImageProcessor(ODD).preprocess(Image.new("RGB", (500, 20), "white"))
    # Five tiles wide, the strip is 350x14 on 350x140: 63 rows of padding above it.
    assert (tiles.layout.rows, tiles.layout.columns, tiles.layout.pad_top) == (2, 5, 63)
    black = (np.float32(0) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    assert np.array_equal(tiles.pixel_values[1, :, 0, 0], black)
    white = (np.float32(1) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    assert np.array_equal(tiles.pixel_values[1, :, 65, 0], white)


def test_original_order_cuts_the_tall_grid() -> None:
    image = Image.fromarray(noise(50, 50))
    original = processing(84, 14, grid_pinpoints("2x2", 84), reference="original")
    tall = processing(84, 14, ((168, 84),))
    ours = ImageProcessor(original).preprocess(image).pixel_values
    assert np.array_equal(ours, reference_pixels(image, tall))


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(RequestError, match="no multiple of the patch side"):
        ImageProcessor(processing(70, 16, ()))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    values=st.sampled_from([ODD, SMALL]),
    mode=st.sampled_from(["RGB", "L", "RGBA", "CMYK"]),
)
def test_any_image_is_bit_equal(
    height: int, width: int, values: ImageProcessing, mode: str
) -> None:
    image = Image.fromarray(noise(height, width)).convert(mode)
    assert_bit_equal(image, image, values)


CROPPED = {
    "crop336": processing(336, 14, (), view="crop"),
    "crop70": processing(70, 14, (), view="crop", image_std=(0.5, 0.3, 0.7)),
}


def assert_cropped_as_clip(image: Any, values: ImageProcessing) -> None:
    side = values.tile_size
    cropping: Any = CLIPImageProcessorPil
    reference = cropping(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(values.image_mean),
        image_std=list(values.image_std),
        rescale_factor=values.rescale_factor,
    )

    ours = ImageProcessor(values).preprocess(open_image(image, EXACT))

    theirs = reference(image, return_tensors="np", input_data_format="channels_last")
    assert np.array_equal(ours.pixel_values, theirs["pixel_values"])
    assert ours.layout.num_image_tokens == (side // values.patch_size) ** 2


@pytest.mark.parametrize("values", CROPPED.values(), ids=CROPPED)
@pytest.mark.parametrize(
    "size", [(336, 336), (70, 70), (71, 70), (480, 640), (641, 480), (35, 3000), (400, 9), (1, 1)]
)
def test_the_middle_of_an_image_is_what_clip_sees(
    values: ImageProcessing, size: tuple[int, int]
) -> None:
    assert_cropped_as_clip(noise(*size), values)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(5, 400), width=st.integers(5, 400))
def test_the_middle_of_any_size_is_what_clip_sees(height: int, width: int) -> None:
    assert_cropped_as_clip(noise(height, width), CROPPED["crop70"])


def test_a_sliver_has_no_middle() -> None:
    processor = ImageProcessor(CROPPED["crop70"])

    processor.preprocess(Image.new("RGB", (3 * MAX_CROP_RATIO, 3)))
    with pytest.raises(ImageError, match="only its middle would be seen"):
        processor.preprocess(Image.new("RGB", (3 * MAX_CROP_RATIO + 1, 3)))
