"""Pictures that are given in memory are compared with the reference's reading of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from llava_edge.convert.verification.media.in_memory_images import memory_faults
from llava_edge.runtime.processing.images import loading as images

Change = Callable[[Any], Any]


def _alpha_dropped(array: Any) -> Any:
    return array[..., :3].copy() if array.shape[2:] == (4,) else array


def _doubled(array: Any) -> Any:
    return array * 2 if array.dtype == np.float32 else array


def _halved(array: Any) -> Any:
    return array // 2 if array.dtype == np.uint16 else array


def _grey_inverted(array: Any) -> Any:
    return 255 - array if array.ndim == 2 and array.dtype == np.uint8 else array


def _blue_first(array: Any) -> Any:
    return array[..., ::-1].copy() if array.shape[2:] == (3,) else array


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGB") if image.mode in ("RGBA", "LA", "PA", "P") else image


def _ink_inverted(image: Image.Image) -> Image.Image:
    return ImageChops.invert(image) if image.mode == "CMYK" else image


def _cut_off(image: Image.Image) -> Image.Image:
    return image.convert("RGB") if image.mode.startswith("I;16") else image


def test_a_sound_runtime_reads_all_of_them() -> None:
    count, faults = memory_faults()

    assert count >= 30
    assert faults == []


@pytest.mark.parametrize(
    ("opener", "change"),
    [
        ("_from_array", _alpha_dropped),
        ("_from_array", _doubled),
        ("_from_array", _halved),
        ("_from_array", _grey_inverted),
        ("_from_array", _blue_first),
        ("_from_pillow", ImageOps.exif_transpose),
        ("_from_pillow", _without_alpha),
        ("_from_pillow", _ink_inverted),
        ("_from_pillow", _cut_off),
    ],
)
def test_a_wrong_reading_is_found(
    monkeypatch: pytest.MonkeyPatch, opener: str, change: Change
) -> None:
    real = getattr(images, opener)
    monkeypatch.setattr(images, opener, lambda given, limits: real(change(given), limits))

    assert memory_faults()[1]


def test_a_refusal_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("no arrays")

    monkeypatch.setattr(images, "_from_array", refuse)

    assert all("no arrays" in fault for fault in memory_faults()[1])
