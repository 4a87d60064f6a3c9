"""Image processor settings: from a checkpoint's JSON to the values the runtime computes with.

The runtime does one thing with a kind of model: AnyRes tiles (bicubic, black padding, rescale,
normalise), or for LLaVA-1.5 one tile from the middle of an image. A checkpoint that asks its
processor for anything else is refused here, all differences together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.model_dims import ModelDims
from llava_edge.runtime.manifest import ImageProcessing, Reference

BICUBIC = 3
"""Pillow's number of the bicubic filter, as the hub's files write it."""

CLASSES = frozenset(
    {
        *("LlavaNextImageProcessor", "CLIPImageProcessor", "LlavaImageProcessor"),
        # Of the video model, whose processors were saved to one file.
        *("LlavaNextVideoImageProcessor", "LlavaNextVideoVideoProcessor"),
    }
)
"""Image processors that are known, without ``Fast`` and ``Pil``, which say who resizes."""

_ALWAYS = ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize")


def read_image_processing(
    settings: Mapping[str, Any],
    dims: ModelDims,
    pinpoints: tuple[tuple[int, int], ...],
    reference: Reference,
) -> ImageProcessing:
    """Check a ``preprocessor_config.json`` against the model and keep what is computed with.

    Args:
        settings: the checkpoint's image processor values.
        dims: the model's dimensions.
        pinpoints: (height, width) candidates that the artifact will use.
        reference: how ties between grids are decided.

    Raises:
        CheckpointError: the processor would do something else than the runtime does.
    """
    check_image_class(settings)
    tile = dims.vision.image_size
    faults = [
        f"{key} is false; the runtime always does it"
        for key in (*_ALWAYS, "do_pad" if dims.takes_tiles else "do_center_crop")
        if settings.get(key) is False
    ]
    if not dims.takes_tiles:
        faults += middle_faults(settings)
        if settings.get("do_pad"):
            faults.append("do_pad is true; the middle of an image is seen, and nothing is padded")
    if settings.get("resample", BICUBIC) != BICUBIC:
        faults.append(f"resample is {settings['resample']}; only bicubic ({BICUBIC}) is done")
    for key in ("size", "crop_size"):
        side = read_side(settings.get(key, tile))
        if side != tile:
            faults.append(f"{key} is {settings[key]}; the tower's tiles are {tile}x{tile}")
    own = settings.get("image_grid_pinpoints")
    if own is not None and dims.image_grid_pinpoints:
        listed = tuple((int(height), int(width)) for height, width in own)
        if listed != dims.image_grid_pinpoints:
            faults.append(
                f"image_grid_pinpoints {[list(p) for p in listed]} differ from those of "
                f"config.json {[list(p) for p in dims.image_grid_pinpoints]}"
            )
    mean = read_triple(settings, "image_mean", faults)
    std = read_triple(settings, "image_std", faults)
    if faults:
        listed_faults = "\n  - ".join(faults)
        raise CheckpointError(
            f"the image processor's settings cannot be kept faithfully:\n  - {listed_faults}"
        )
    return ImageProcessing(
        tile_size=tile,
        patch_size=dims.vision.patch_size,
        image_grid_pinpoints=pinpoints,
        image_mean=mean,
        image_std=std,
        rescale_factor=float(settings.get("rescale_factor", 1 / 255)),
        reference=reference,
        view="tiles" if dims.takes_tiles else "crop",
    )


def check_image_class(settings: Mapping[str, Any]) -> None:
    """Refuse an image processor that is none of transformers' own.

    Raises:
        CheckpointError: names the class and what to do.
    """
    name = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if name is None and isinstance(mapped := settings.get("auto_map"), Mapping):
        named = mapped.get("AutoImageProcessor")
        listed = named if isinstance(named, list) else [named]
        name = next((each for each in reversed(listed) if each is not None), None)
    if name is None:
        return
    short = str(name).removesuffix("Fast").removesuffix("Pil")
    if short.replace("FeatureExtractor", "ImageProcessor") not in CLASSES:
        raise CheckpointError(
            f"the checkpoint's image processor is of the class {name!r:.80}; known are "
            f"{', '.join(sorted(CLASSES))}. Code of a checkpoint is never run. Where its values "
            "are those of a known class, name that one as image_processor_type in "
            "preprocessor_config.json and remove auto_map."
        )


def middle_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What of a processor that sees the middle of a picture the runtime does not do."""
    size = settings.get("size")
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        yield f"size is {dict(size)}; the shorter side is resized, so shortest_edge must be there"


def read_side(size: Any) -> int | None:
    """One side in pixels of a size given as a number, a shortest edge, or height and width."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        height, width = size.get("height"), size.get("width")
        return int(height) if height is not None and height == width else None
    return int(size)


def read_triple(
    settings: Mapping[str, Any], key: str, faults: list[str]
) -> tuple[float, float, float]:
    """Three numbers, one a channel; a fault is noted where they are not there."""
    values = settings.get(key)
    if not isinstance(values, Sequence) or len(values) != 3:
        faults.append(f"{key} is {values!r}; three numbers are needed")
        return (0.0, 0.0, 0.0)
    return (float(values[0]), float(values[1]), float(values[2]))
