"""Pixels of more than 8 bits are scaled and noted, or clipped as the reference does."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb as reference_convert_to_rgb

from llava_edge.profiles.errors import ImageError, RequestError
from llava_edge.runtime.processing.images import loading as images
from llava_edge.runtime.processing.images.loading import load_image
from llava_edge.runtime.util.image_formats import READABLE_FORMATS
from llava_edge.runtime.util.limits import Limits

EVERY = Limits(image_formats=READABLE_FORMATS)
CLIP = Limits(image_formats=READABLE_FORMATS, high_bit_depth="clip")
RAMP = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (64, 1))


@pytest.fixture(autouse=True)
def many_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_STRIP_PIXELS", 1000)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(source: Any, limits: Limits = EVERY) -> Any:
    pixels = np.asarray(load_image(source, limits).image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_files_keep_their_grey_levels(kind: str) -> None:
    data = saved(Image.fromarray(RAMP), kind)
    opened = load_image(data, EVERY)

    assert np.array_equal(np.asarray(opened.image)[..., 0], (RAMP.astype(int) + 128) // 257)
    assert len(np.unique(np.asarray(opened.image))) == 256
    (note,) = opened.notes
    assert "16-bit values were scaled to 8 bits" in note
    assert 'Limits(high_bit_depth="clip")' in note


def test_clipping_is_bit_equal_to_the_reference_and_needs_no_note() -> None:
    image = Image.fromarray(RAMP)
    opened = load_image(image, CLIP)

    assert np.array_equal(opened.image, reference_convert_to_rgb(image, return_numpy=True))
    assert opened.notes == ()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_order_of_bytes_is_scaled(mode: str) -> None:
    order = {"I;16L": "<u2", "I;16B": ">u2"}.get(mode, "=u2")
    image = Image.frombytes(mode, (256, 64), RAMP.astype(order).tobytes())

    assert np.array_equal(grey(image), (RAMP.astype(int) + 128) // 257)


def ramp(low: float, high: float, dtype: Any) -> Any:
    return np.linspace(low, high, 40 * 100).reshape(40, 100).astype(dtype)


@pytest.mark.parametrize(
    ("values", "noted"),
    [
        (ramp(0, 1, np.float32), "from 0 to 1"),
        (ramp(0, 60_000, np.float32), "up to 65535"),
        (ramp(-3, 5, np.float32), "from -3 to 5"),
        (ramp(0, 1e30, np.float32), "from 0 to 1e+30"),
        (ramp(0, 65_535, np.int32), "up to 65535"),
        (ramp(-100, 2**31 - 1, np.int32), "from -100"),
    ],
)
@pytest.mark.parametrize("form", ["pillow", "file", "array"])
def test_values_are_scaled_by_their_range(values: Any, noted: str, form: str) -> None:
    source: Any = values if form == "array" else Image.fromarray(values)
    if form == "file":
        source = saved(source, "TIFF")
    opened = load_image(source, EVERY)
    found = np.asarray(opened.image)[..., 0].astype(int)

    assert found.min() == 0
    assert found.max() >= 233
    assert (np.diff(found.ravel()) >= 0).all()
    assert noted in opened.notes[0]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_that_eight_bits_hold_stay_as_they_are(dtype: Any) -> None:
    values = ramp(0, 255, dtype)
    image = Image.fromarray(values)

    for source in (image, values):
        opened = load_image(source)
        expected = reference_convert_to_rgb(image, return_numpy=True)
        assert np.array_equal(opened.image, expected)
        assert opened.notes == ()


def test_what_is_not_finite_becomes_an_end_of_the_range() -> None:
    values = np.array([[np.nan, -np.inf, np.inf, -2.0, 2.0, 0.0]], np.float32)
    for source in (Image.fromarray(values), values):
        assert grey(source).tolist() == [[0, 0, 255, 0, 255, 128]]
    assert grey(np.full((2, 2), np.nan)).tolist() == [[0, 0], [0, 0]]


def test_one_value_throughout_does_not_divide_by_nothing() -> None:
    assert grey(np.full((3, 3), -7.0)).tolist() == [[0] * 3] * 3


def test_the_transparent_grey_of_a_sixteen_bit_file_is_laid_on_white() -> None:
    data = saved(Image.fromarray(RAMP), "PNG", transparency=0)

    assert (grey(data)[:, 0] == 255).all()
    assert (grey(data)[:, 1] == 1).all()


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays_of_sixteen_bits_are_scaled_as_files_are(channels: int | None) -> None:
    shape = (20, 30) if channels is None else (20, 30, channels)
    deep = np.random.default_rng(5).integers(0, 65536, shape, np.uint16)
    eight = ((deep.astype(int) + 128) // 257).astype(np.uint8)
    opened = load_image(deep)

    assert np.array_equal(opened.image, load_image(eight).image)
    assert "16-bit" in opened.notes[0]


def test_floats_from_0_to_1_and_booleans_are_taken_as_shares_of_white() -> None:
    assert grey(np.array([[0.0, 0.5, 1.0]])).tolist() == [[0, 128, 255]]
    assert grey(np.array([[False, True]])).tolist() == [[0, 255]]
    rgba = np.array([[[1.0, 0.0, 0.0, 0.5]]])
    assert np.asarray(load_image(rgba).image).tolist() == [[[255, 127, 127]]]


def test_alpha_without_a_known_range_is_refused() -> None:
    with pytest.raises(ImageError, match="leave open what its alpha channel means"):
        load_image(np.array([[[-1.0, 0.0, 0.0, 0.5]]]))


def test_clipped_arrays_are_cut_off_at_both_ends() -> None:
    values = np.array([[-5.0, 0.9, 254.9, 256.0, np.nan, np.inf]])
    assert grey(values, CLIP).tolist() == [[0, 0, 254, 255, 0, 255]]
    assert grey(np.array([[300, 70]], np.uint16), CLIP).tolist() == [[255, 70]]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(
        RequestError, match="high_bit_depth 'stretch' is unknown; choices are scale"
    ):
        Limits(high_bit_depth="stretch")  # type: ignore[arg-type]
