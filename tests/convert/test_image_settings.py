from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.convert.checkpoint import Checkpoint, open_checkpoint
from llava_edge.convert.image_settings import read_image_processing
from llava_edge.profiles.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint("odd"))


def read(checkpoint: Checkpoint, **changes: Any) -> Any:
    settings = checkpoint.preprocessor_config() | changes
    dims = checkpoint.dims
    return read_image_processing(settings, dims, dims.image_grid_pinpoints, "hf")


def test_a_checkpoints_settings_are_kept(checkpoint: Checkpoint) -> None:
    processing = read(checkpoint)

    assert (processing.tile_size, processing.patch_size) == (70, 14)
    assert processing.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert processing.rescale_factor == pytest.approx(1 / 255, abs=1e-12)


@pytest.mark.parametrize("size", [70, {"shortest_edge": 70}, {"height": 70, "width": 70}])
def test_every_way_of_writing_the_tile_size_is_read(checkpoint: Checkpoint, size: Any) -> None:
    assert read(checkpoint, size=size).tile_size == 70


def test_everything_the_runtime_does_not_do_is_named_together(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(
            checkpoint,
            do_pad=False,
            resample=2,
            size={"shortest_edge": 71},
            crop_size={"height": 70, "width": 84},
            image_grid_pinpoints=[[70, 70]],
            image_mean=[0.5],
        )

    for part in ("do_pad", "resample is 2", "size is", "crop_size is", "[70, 70]", "image_mean"):
        assert part in str(caught.value)


@pytest.fixture(scope="module")
def cropping(make_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(make_checkpoint("odd", model_type="llava"))


def test_a_model_without_tiles_sees_the_middle(cropping: Checkpoint) -> None:
    assert read(cropping).view == "crop"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"do_pad": True}, "do_pad is true"),
        ({"size": {"height": 70, "width": 70}}, "shortest_edge must be there"),
    ],
)
def test_another_way_to_one_view_is_refused(
    cropping: Checkpoint, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(cropping, **changes)
