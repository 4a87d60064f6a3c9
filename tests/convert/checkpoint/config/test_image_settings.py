"""Processor files are kept where transformers computes the same pixels with them, else refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from llava_edge.convert.checkpoint.config.image import read_image_processing
from llava_edge.convert.checkpoint.config.video import read_video_processing
from llava_edge.convert.checkpoint.open import Checkpoint, open_checkpoint
from llava_edge.profiles.errors import CheckpointError
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.images.loading import open_image

TILE = 70
ABSENT = object()


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint("odd"))


@pytest.fixture(scope="module")
def cropping(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint("odd", model_type="llava"))


def changed(checkpoint: Checkpoint, changes: dict[str, Any]) -> dict[str, Any]:
    settings = {**checkpoint.preprocessor_config(), **changes}
    return {key: value for key, value in settings.items() if value is not ABSENT}


def read(checkpoint: Checkpoint, **changes: Any) -> Any:
    dims = checkpoint.dims
    settings = changed(checkpoint, changes)
    return read_image_processing(settings, dims, dims.image_grid_pinpoints, "hf")


def pixels_of_transformers(checkpoint: Checkpoint, changes: dict[str, Any]) -> Any:
    """Pixels, or None where transformers refuses the settings or divides by zero."""
    kind: Any = LlavaNextImageProcessorPil if checkpoint.dims.takes_tiles else CLIPImageProcessorPil
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processor = kind(**changed(checkpoint, changes))
            found = np.asarray(processor(images=[picture()], return_tensors="np")["pixel_values"])
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return None
    return found if np.isfinite(found).all() else None


def picture() -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 256, (90, 150, 3), np.uint8)
    return Image.fromarray(noise)


def test_a_checkpoints_settings_are_kept(checkpoint: Checkpoint) -> None:
    processing = read(checkpoint)

    assert (processing.tile_size, processing.patch_size) == (70, 14)
    assert processing.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert processing.rescale_factor == pytest.approx(1 / 255, abs=1e-12)


SQUARE = {"height": TILE, "width": TILE}
VALUES: dict[str, tuple[Any, ...]] = {
    "size": (
        None, ABSENT, TILE, [TILE, TILE], SQUARE, [TILE], [TILE, 84], float(TILE), str(TILE), {},
        True, {"shortest_edge": 71}, {"shortest_edge": None}, {"shortest_edge": float(TILE)},
        {"longest_edge": TILE}, {"shortest_edge": TILE, "longest_edge": TILE},
        {"shortest_edge": TILE, "longest_edge": 40}, {"height": TILE}, {**SQUARE, "depth": 1},
        [[TILE, TILE]], {"shortest_edge": -TILE}, {"shortest_edge": [TILE]}, 10**30,
    ),
    "crop_size": (
        None, ABSENT, TILE, [TILE, TILE], SQUARE, [TILE], 35, float(TILE), {}, {"height": TILE},
        {"shortest_edge": TILE}, {"longest_edge": TILE}, {"height": TILE, "width": 84}, "70", 0,
    ),
    "image_mean": (None, ABSENT, 0.5, 0, [0.5], [0.5] * 4, "x", [0.5, None, 0.5], [[0.5] * 3], {}),
    "image_std": (None, ABSENT, 0.5, 0, [1, 0, 1], 1, float("nan"), [0.5, float("inf"), 0.5]),
    "resample": (None, ABSENT, 2, 3, 3.0, True, "bicubic", "3", [3], 99),
    "rescale_factor": (None, ABSENT, 1, 0.5, "x", [1 / 255], float("nan"), {}),
    "do_resize": (None, ABSENT, False, True, 0, 1, []),
    "do_center_crop": (None, ABSENT, False, True, 0, 1),
    "do_rescale": (None, ABSENT, False, True, 0, 1),
    "do_normalize": (None, ABSENT, False, True, 0, 1),
    "do_convert_rgb": (None, ABSENT, False, True, 0, 1),
    "do_pad": (None, ABSENT, False),
    "image_grid_pinpoints": (
        None, ABSENT, [], [[TILE, TILE]], [[TILE]], "[[70, 140]]", 7, [None], {"a": 1},
        [[70.0, 140.0], [140, 70], [140, 140], [210, 70], [70, 210]],
        [[70.5, 140], [140, 70], [140, 140], [210, 70], [70, 210]],
        [["70", "140"]], [[TILE, 2 * TILE]] * 5000,
    ),
    "device": (None, "cpu"),
    "default_to_square": (None, True),
    "data_format": ("channels_last",),
    "pad_size": (SQUARE,),
}  # fmt: skip
CHANGES = [{key: value} for key, values in VALUES.items() for value in values] + [
    {"crop_size": None, "do_center_crop": False},
    {"crop_size": None, "do_center_crop": None},
    {"do_resize": False, "do_center_crop": False, "do_pad": None, "do_convert_rgb": None},
    {"do_resize": None, "resample": None},
    {"do_resize": None, "size": None},
    {"do_normalize": None, "image_mean": None, "image_std": None},
    {"size": SQUARE, "crop_size": TILE, "image_mean": 0.5, "image_std": 0.5},
]
# Where transformers' processor stops at an image, and what it means is plain.
CLEAR_ANYWAY = (
    {"crop_size": None},
    {"crop_size": None, "do_center_crop": True},
    {"image_grid_pinpoints": None},
)

# What no processor writes, and what happens to do no harm there.
NO_VALUES = (
    {"do_resize": []},
    {"size": {"shortest_edge": [TILE]}},
    {"image_grid_pinpoints": [[70.5, 140], [140, 70], [140, 140], [210, 70], [70, 210]]},
    {"rescale_factor": [1 / 255]},
    {"do_pad": True},
)


def named(changes: dict[str, Any]) -> str:
    shown = ((key, "absent" if value is ABSENT else value) for key, value in changes.items())
    return ", ".join(f"{key}={value!r:.40}" for key, value in shown)


@pytest.mark.parametrize("changes", CHANGES, ids=named)
@pytest.mark.parametrize("view", ["tiles", "crop"])
def test_settings_are_kept_where_transformers_computes_the_same_and_refused_elsewhere(
    checkpoint: Checkpoint, cropping: Checkpoint, view: str, changes: dict[str, Any]
) -> None:
    model = checkpoint if view == "tiles" else cropping
    theirs = pixels_of_transformers(model, changes)
    try:
        processing = read(model, **changes)
    except CheckpointError as caught:
        error = str(caught)
    else:
        error = None
    if error is not None:
        assert f"\n  - {next(iter(changes))} is" in error or len(changes) > 1
        assert len(error) < 2_000
        # Refused is what changes pixels, and nothing else.
        same = theirs is not None and np.array_equal(theirs, pixels_of_transformers(model, {}))
        assert not same or changes in NO_VALUES
        return
    ours = ImageProcessor(processing).preprocess(open_image(picture())).pixel_values
    if theirs is None:
        assert changes in CLEAR_ANYWAY
        assert view == "tiles"
    else:
        np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


def test_everything_the_runtime_does_not_do_is_named_together(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(
            checkpoint,
            do_rescale=False,
            resample=2,
            size={"shortest_edge": 71},
            crop_size={"height": 70, "width": 84},
            image_grid_pinpoints=[[70, 70]],
            image_mean=[0.5],
        )

    for part in (
        "do_rescale",
        "resample is 2",
        "size is",
        "crop_size is",
        "[70, 70]",
        "image_mean",
    ):
        assert part in str(caught.value)


def test_grids_that_only_config_json_has_are_told_with_the_ones_that_would_be_used(
    checkpoint: Checkpoint,
) -> None:
    with pytest.raises(CheckpointError, match=r"is missing, .*\[336, 672\].*Copy these"):
        read(checkpoint, image_grid_pinpoints=ABSENT)


def test_a_model_without_tiles_sees_the_middle(cropping: Checkpoint) -> None:
    assert read(cropping).view == "crop"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"do_center_crop": None}, "do_center_crop is null"),
        ({"do_pad": True}, "do_pad is true"),
        ({"size": {"height": 70, "width": 70}}, "shortest_edge must be there"),
        ({"size": [70, 70]}, "shortest_edge must be there"),
    ],
)
def test_another_way_to_one_view_is_refused(
    cropping: Checkpoint, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(cropping, **changes)


@pytest.mark.parametrize("changes", CHANGES, ids=named)
def test_a_video_processor_is_read_by_the_same_rules(
    cropping: Checkpoint, changes: dict[str, Any]
) -> None:
    """Its classes share the code and the defaults of the one that sees the middle."""
    if "do_pad" in changes or "image_grid_pinpoints" in changes:
        return

    def outcome(kept: Callable[[], Any]) -> Any:
        try:
            values = kept()
        except CheckpointError as error:
            return str(error).split("\n", 1)[1]
        return (values.image_mean, values.image_std, values.rescale_factor)

    settings = changed(cropping, changes)

    assert outcome(lambda: read_video_processing(settings, cropping.dims, 8)) == outcome(
        lambda: read(cropping, **changes)
    )
