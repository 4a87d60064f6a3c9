from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llava_edge.profiles.models.model_dims import VisionDims
from llava_edge.profiles.models.variants import find_variant
from llava_edge.runtime.vision.pooling import pooling_index


@pytest.fixture
def vision() -> VisionDims:
    return find_variant("LLaVA-NeXT-Video-7B").dims.vision


def test_tokens_of_a_frame_are_means_of_squares(vision: VisionDims) -> None:
    features = torch.randn(2, 576, 5, dtype=torch.float64)
    pool = torch.nn.AvgPool2d(2, 2)
    theirs = pool(features.view(2, 24, 24, 5).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)

    index = pooling_index(vision, 144)

    assert index.shape == (144, 4)
    assert np.allclose(features.numpy()[:, index].mean(2), theirs.numpy(), rtol=1e-12)


def test_tokens_of_a_tile_are_its_patches(vision: VisionDims) -> None:
    assert pooling_index(vision, 576).ravel().tolist() == list(range(576))


def test_other_numbers_are_no_pooling(vision: VisionDims) -> None:
    with pytest.raises(ValueError, match="36 tokens are neither 576 nor 144"):
        pooling_index(vision, 36)
    assert len(pooling_index(replace(vision, image_size=56), 4)) == 4
