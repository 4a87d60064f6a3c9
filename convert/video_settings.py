"""Video processor settings: from a checkpoint's JSON to the values the runtime computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_edge.convert.image_settings import BICUBIC, middle_faults, read_side, read_triple
from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.model_dims import ModelDims
from llava_edge.runtime.manifest import VideoProcessing

_ALWAYS = ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize")


def read_video_processing(
    settings: Mapping[str, Any], dims: ModelDims, max_frames: int
) -> VideoProcessing:
    """Check a ``video_preprocessor_config.json`` against the model and keep what is computed with.

    Args:
        settings: the checkpoint's video processor values.
        dims: the model's dimensions.
        max_frames: what the plan counted with.

    Raises:
        CheckpointError: the processor would do something else than the runtime does.
    """
    tile = dims.vision.image_size
    faults = [
        f"{key} is false; the runtime always does it"
        for key in _ALWAYS
        if settings.get(key) is False
    ]
    faults += middle_faults(settings)
    if settings.get("resample", BICUBIC) != BICUBIC:
        faults.append(f"resample is {settings['resample']}; only bicubic ({BICUBIC}) is done")
    for key in ("size", "crop_size"):
        if read_side(settings.get(key, tile)) != tile:
            faults.append(f"{key} is {settings[key]}; the tower's tiles are {tile}x{tile}")
    mean = read_triple(settings, "image_mean", faults)
    std = read_triple(settings, "image_std", faults)
    if faults:
        listed = "\n  - ".join(faults)
        raise CheckpointError(
            f"the video processor's settings cannot be kept faithfully:\n  - {listed}"
        )
    return VideoProcessing(
        frame_size=tile,
        image_mean=mean,
        image_std=std,
        rescale_factor=float(settings.get("rescale_factor", 1 / 255)),
        max_frames=max_frames,
    )
