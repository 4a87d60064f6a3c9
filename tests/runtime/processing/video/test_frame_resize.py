"""Frames are resized bit for bit as torch does, which is what the reference's processor calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from llava_edge.runtime.processing.images.image_processor import shorter_side_to
from llava_edge.runtime.processing.video.frame_resize import resize_middle

Pixels = NDArray[np.uint8]


def by_torch(frame: Pixels, height: int, width: int, side: int) -> Pixels:
    turned = torch.from_numpy(frame).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        turned, [height, width], mode="bicubic", align_corners=False, antialias=True
    )
    top, left = (height - side) // 2, (width - side) // 2
    return resized[0].permute(1, 2, 0).numpy()[top : top + side, left : left + side]


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(8, 500), width=st.integers(8, 500), side=st.sampled_from([56, 70, 84, 336])
)
def test_any_size_is_resized_as_torch_does(height: int, width: int, side: int) -> None:
    frame = noise(height, width)
    size = shorter_side_to(side, height, width)

    ours = resize_middle(frame, *size, side)

    assert np.array_equal(ours, by_torch(frame, *size, side))


@pytest.mark.parametrize("size", [(720, 1280), (1280, 720), (337, 336), (336, 336), (672, 672)])
def test_sizes_of_cameras_are_resized_as_torch_does(size: tuple[int, int]) -> None:
    frame = np.array(Image.effect_noise(size[::-1], 60).convert("RGB"))
    target = shorter_side_to(336, *size)

    assert np.array_equal(resize_middle(frame, *target, 336), by_torch(frame, *target, 336))


def test_black_and_white_borders_stay_within_a_byte() -> None:
    # The filter's negative lobes reach below 0 and above 255 at a hard edge.
    frame = np.zeros((200, 200, 3), np.uint8)
    frame[:, 100:] = 255

    assert np.array_equal(resize_middle(frame, 84, 84, 84), by_torch(frame, 84, 84, 84))


def test_pillow_would_give_other_bits() -> None:
    frame = noise(480, 640)
    height, width = shorter_side_to(336, 480, 640)
    left = (width - 336) // 2
    pillow = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))

    assert not np.array_equal(
        resize_middle(frame, height, width, 336), pillow[:, left : left + 336]
    )
