"""Video processor settings: from a checkpoint's JSON to the values the runtime computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_edge.convert.checkpoint.config.image import read_pixel_values
from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.model_dims import ModelDims
from llava_edge.runtime.artifact.manifest import VideoProcessing


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
    faults: list[str] = []
    values = read_pixel_values(settings, tile, False, faults)
    if faults:
        listed = "\n  - ".join(faults)
        raise CheckpointError(
            f"the video processor's settings cannot be kept faithfully:\n  - {listed}"
        )
    return VideoProcessing(
        frame_size=tile,
        image_mean=values.mean,
        image_std=values.std,
        rescale_factor=values.rescale_factor,
        max_frames=max_frames,
    )
