"""Pixels of frames are bit-equal to the reference's steps, done in torch."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava_edge.convert.verification.reference.video import frame_pixels
from llava_edge.profiles.errors import ImageError
from llava_edge.runtime.artifact.manifest import VideoProcessing
from llava_edge.runtime.processing.video.video_processor import VideoProcessor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def processor(side: int = 336) -> VideoProcessor:
    return VideoProcessor(VideoProcessing(side, MEAN, STD, 1 / 255, 32))


@pytest.mark.parametrize(
    ("height", "width"),
    [(336, 336), (720, 1280), (640, 360), (100, 99), (337, 1000), (90, 160)],
)
def test_pixels_are_those_of_the_reference(height: int, width: int) -> None:
    frames = [Image.effect_noise((width, height), 40 + i).convert("RGB") for i in range(3)]

    ours = processor().preprocess((np.asarray(frame) for frame in frames), len(frames))

    theirs = frame_pixels(frames, {"image_mean": MEAN, "image_std": STD}, 336).numpy()
    assert ours.dtype == np.float32
    assert np.array_equal(ours, theirs)


def test_pixels_differ_from_those_of_an_image() -> None:
    # The reference folds rescaling into mean and deviation for frames and not for images.
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    values = (np.arange(256) * (1 / 255)).astype(np.float32).reshape(16, 16)
    as_image = (values - np.float32(MEAN[0])) / np.float32(STD[0])

    ours = processor(16).preprocess([frame], 1)[0, 0]

    assert np.allclose(ours, as_image, atol=1e-6)
    assert not np.array_equal(ours, as_image)


def test_a_sliver_is_refused() -> None:
    with pytest.raises(ImageError, match="only its middle would be seen"):
        processor().preprocess([np.zeros((3, 400, 3), np.uint8)], 1)
