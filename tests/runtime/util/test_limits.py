"""Limits are checked when they are made."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llava_edge.profiles.errors import RequestError
from llava_edge.runtime.util.limits import READABLE_FORMATS, Limits


def test_defaults_hold_any_photograph() -> None:
    limits = Limits()
    # 50 megapixels, the common full resolution of telephones.
    assert limits.max_image_pixels >= 8160 * 6144
    assert limits.max_image_side >= 8160
    assert set(READABLE_FORMATS) - set(limits.image_formats) == {"TIFF"}


def test_all_bad_limits_are_named_at_once() -> None:
    wrong: dict[str, Any] = {"max_images": 0, "max_image_pixels": 1.5, "image_formats": ("EPS",)}
    with pytest.raises(RequestError) as caught:
        Limits(**wrong)
    for part in ("max_images is 0", "max_image_pixels is 1.5", "holds EPS; readable are JPEG"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_formats", print),
        ("image_formats", "PNG"),
        ("video_codecs", [1]),
        ("video_formats", (1,)),
        ("video_formats", None),
    ],
)
def test_lists_of_names_are_tuples_of_texts(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"{name} is .*; it must be a tuple of names"):
        Limits(**{name: value})


def test_true_is_no_number() -> None:
    with pytest.raises(RequestError, match="max_images is True"):
        Limits(max_images=True)


@pytest.mark.parametrize("value", [None, "stretch", 8, np.array(["scale", "clip"])])
def test_a_choice_that_there_is_not_is_named(value: Any) -> None:
    with pytest.raises(RequestError, match=r"high_bit_depth .* is unknown; .* are scale, clip"):
        Limits(high_bit_depth=value)


def test_no_format_at_all_is_refused() -> None:
    with pytest.raises(RequestError, match="image_formats is empty; readable are JPEG"):
        Limits(image_formats=())


def test_limits_can_be_copied_pickled_and_replaced() -> None:
    limits = Limits(max_images=3)
    assert pickle.loads(pickle.dumps(limits)) == copy.deepcopy(limits) == limits
    assert replace(limits, max_images=4).max_images == 4
