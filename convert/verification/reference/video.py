"""Frames of a video as the reference's video processor makes them, step by step in torch.

``LlavaNextVideoVideoProcessor`` itself needs torchvision, of which no build goes with the pinned
torch. Its steps are these (transformers 5.23.0 ``BaseVideoProcessor._preprocess`` and
``TorchvisionBackend``): the shorter side resized by torchvision's ``resize``, which for 8-bit
bicubic calls torch's own ``interpolate`` with antialias; a centre crop; rescaling folded into mean
and deviation; all in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def frame_pixels(video: Sequence[Image], settings: Mapping[str, Any], side: int) -> torch.Tensor:
    """Pixels of all frames.

    Args:
        video: frames of one size.
        settings: of the checkpoint's video processor: mean, deviation, rescale factor.
        side: of a tile in pixels.

    Returns:
        float32 [frames, 3, T, T].
    """
    stacked = np.stack([np.asarray(frame.convert("RGB")) for frame in video])
    frames = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    sizing: Any = get_resize_output_image_size
    size = sizing(
        stacked[0], size=side, default_to_square=False, input_data_format=ChannelDimension.LAST
    )
    if tuple(size) != tuple(frames.shape[-2:]):
        frames = torch.nn.functional.interpolate(
            frames, size=list(size), mode="bicubic", align_corners=False, antialias=True
        )
    top, left = (int((length - side) / 2.0) for length in frames.shape[-2:])
    frames = frames[..., top : top + side, left : left + side]
    factor = 1.0 / settings.get("rescale_factor", 1 / 255)
    # A single number holds for every channel.
    mean = torch.tensor(settings.get("image_mean", OPENAI_CLIP_MEAN)).expand(3) * factor
    std = torch.tensor(settings.get("image_std", OPENAI_CLIP_STD)).expand(3) * factor
    pixels: torch.Tensor = (frames.to(torch.float32) - mean[:, None, None]) / std[:, None, None]
    return pixels
