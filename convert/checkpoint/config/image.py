"""Image processor settings: from a checkpoint's JSON to the values the runtime computes with.

The runtime does one thing with a kind of model: AnyRes tiles (bicubic, black padding, rescale,
normalise), or for LLaVA-1.5 one tile from the middle of an image. A checkpoint that asks its
processor for anything else is refused here, all differences together. What changes no pixel is
accepted: tiles are cut in the tower's size, so that resizing and cropping them do nothing.

Source: transformers 5.23 ``LlavaNextImageProcessor``, ``CLIPImageProcessor`` and
``BaseImageProcessor``. There an absent key has the class's value; null means none at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_edge.profiles.errors import CheckpointError
from llava_edge.profiles.models.model_dims import STOCK_PINPOINTS, ModelDims
from llava_edge.runtime.artifact.manifest import ImageProcessing, Reference

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

CLASS_VALUES: Mapping[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}
"""What the processors' classes have for a key that a file leaves out."""

_CROPPED = ("do_center_crop", "do_normalize", "do_rescale", "do_resize")
_TILED = ("do_normalize", "do_rescale")
_MAX_PINPOINTS = 1024


@dataclass(frozen=True)
class PixelValues:
    """What is computed with pixels: mean and deviation a channel, and the factor before."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float


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
    faults: list[str] = []
    if not dims.takes_tiles and settings.get("do_pad"):
        faults.append("do_pad is true; the middle of an image is seen, and nothing is padded")
    values = read_pixel_values(settings, dims.vision.image_size, dims.takes_tiles, faults)
    if dims.takes_tiles:
        _check_pinpoints(settings, dims, faults)
    if faults:
        listed_faults = "\n  - ".join(faults)
        raise CheckpointError(
            f"the image processor's settings cannot be kept faithfully:\n  - {listed_faults}"
        )
    return ImageProcessing(
        tile_size=dims.vision.image_size,
        patch_size=dims.vision.patch_size,
        image_grid_pinpoints=pinpoints,
        image_mean=values.mean,
        image_std=values.std,
        rescale_factor=values.rescale_factor,
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


def read_pixel_values(
    settings: Mapping[str, Any], tile: int, tiled: bool, faults: list[str]
) -> PixelValues:
    """Check all settings that images and frames have in common.

    Args:
        settings: of an image or video processor.
        tile: side of the tower's input in pixels.
        tiled: whether an image is cut into tiles, or seen through its middle.
        faults: what the runtime does not do is noted here.
    """
    known = {**CLASS_VALUES, **settings}
    for key in ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"):
        if known[key] is not None and type(known[key]) not in (bool, int):
            faults.append(f"{key} is {known[key]!r:.80}, not true or false")
        elif key in (_TILED if tiled else _CROPPED) and not known[key]:
            shown = "null" if known[key] is None else "false"
            faults.append(f"{key} is {shown}; the runtime always does it")
    resample = known["resample"]
    if type(resample) is not int or resample != BICUBIC:
        faults.append(f"resample is {resample!r:.80}; only bicubic ({BICUBIC}) is done")
    _check_size(known, "size" in settings, tile, tiled, faults)
    _check_crop(known, "crop_size" in settings, tile, tiled, faults)
    factor: Any = known["rescale_factor"]
    if not _is_positive(factor):
        faults.append(f"rescale_factor is {factor!r:.80}, not a positive number")
    mean = read_triple(known["image_mean"], "image_mean", faults)
    std = read_triple(known["image_std"], "image_std", faults)
    if min(std) <= 0:
        faults.append(f"image_std is {known['image_std']!r:.80}; pixels are divided by it")
    return PixelValues(mean, std, float(factor) if _is_number(factor) else 1.0)


def read_triple(value: Any, key: str, faults: list[str]) -> tuple[float, float, float]:
    """Three numbers, one a channel, or one for all; a fault is noted where they are not there."""
    listed: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(listed) != 3 or not all(_is_number(item) for item in listed):
        faults.append(f"{key} is {value!r:.80}; three numbers are needed, or one for all channels")
        return (1.0, 1.0, 1.0)
    return (float(listed[0]), float(listed[1]), float(listed[2]))


def _check_size(
    known: Mapping[str, Any], given: bool, tile: int, tiled: bool, faults: list[str]
) -> None:
    """The whole image is resized to a tile, or its shorter side to the side of one."""
    size = _sides(known["size"], square=False)
    if size is None or not (size.keys() == {"shortest_edge"} or tiled):
        faults.append(
            f"size is {known['size']!r:.80}; "
            + (f"a tile of {tile}x{tile} is needed" if tiled else "shortest_edge must be there")
        )
        return
    # A longest_edge below the tile would shrink it; above it, it never binds.
    if min(size.values()) != tile or any(
        side != tile for key, side in size.items() if key != "longest_edge"
    ):
        faults.append(f"size {_shown(known['size'], given)}; the tower's tiles are {tile}x{tile}")


def _check_crop(
    known: Mapping[str, Any], given: bool, tile: int, tiled: bool, faults: list[str]
) -> None:
    """Without a crop, tiles have the size of the resized image."""
    if known["crop_size"] is None and tiled:
        return
    crop = _sides(known["crop_size"], square=True)
    if crop != {"height": tile, "width": tile}:
        faults.append(
            f"crop_size {_shown(known['crop_size'], given)}; the tower's tiles are {tile}x{tile}"
        )


def _shown(value: object, given: bool) -> str:
    return f"is {value!r:.80}" if given else f"is missing, for which the processor takes {value}"


def _sides(value: object, square: bool) -> dict[str, int] | None:
    """Sides by name of a size in any form that transformers takes; None for any other."""
    if type(value) is int:
        sides: dict[Any, Any] = (
            {"height": value, "width": value} if square else {"shortest_edge": value}
        )
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        sides = {"height": value[0], "width": value[1]}
    elif isinstance(value, Mapping):
        sides = dict(value)
    else:
        return None
    if sides.keys() not in (
        {"height", "width"},
        {"shortest_edge"},
        {"shortest_edge", "longest_edge"},
    ):
        return None
    return sides if all(type(side) is int and side > 0 for side in sides.values()) else None


def _check_pinpoints(settings: Mapping[str, Any], dims: ModelDims, faults: list[str]) -> None:
    """Null leaves the choice to config.json; an absent key means the released five."""
    own = settings.get("image_grid_pinpoints", STOCK_PINPOINTS)
    if own is None:
        return
    listed = _pairs(own)
    if listed is None:
        faults.append(f"image_grid_pinpoints is {own!r:.80}, not a list of (height, width) pairs")
    elif listed != dims.image_grid_pinpoints:
        shown = [list(point) for point in dims.image_grid_pinpoints]
        given = "image_grid_pinpoints" in settings
        faults.append(
            f"image_grid_pinpoints {_shown([list(point) for point in listed], given)}; they differ "
            f"from those of config.json, {shown!s:.300}. Copy these into the processor's file"
        )


def _pairs(value: object) -> tuple[tuple[int, int], ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) > _MAX_PINPOINTS:
        return None
    pairs = [tuple(point) if isinstance(point, (list, tuple)) else () for point in value]
    if not all(len(pair) == 2 and all(_is_positive(side) for side in pair) for pair in pairs):
        return None
    if any(side != int(side) for pair in pairs for side in pair):
        return None
    return tuple((int(pair[0]), int(pair[1])) for pair in pairs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0
