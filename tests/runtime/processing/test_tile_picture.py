"""The drawing of tiles: its counts add up, and its parts lie where the model's pixels do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_edge.profiles.errors import OutputExistsError, RequestError
from llava_edge.profiles.models.anyres import GRID_NAMES, AnyRes, grid_pinpoints
from llava_edge.runtime.artifact.manifest import ImageProcessing
from llava_edge.runtime.cli.output_file import PngFile
from llava_edge.runtime.processing import tile_preview as tile_picture
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.processing.tile_preview import TileTokens, draw_tiles, stacked

STOCK = AnyRes(336, 14, grid_pinpoints("2x2", 336))
BLUE, HATCH = (20, 60, 200), {tile_picture._PAD, tile_picture._STRIPE}


@given(
    grid=st.sampled_from(GRID_NAMES),
    patch=st.sampled_from((14, 28)),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
)
def test_counts_of_all_parts_are_the_tokens_of_the_image(
    grid: str, patch: int, height: int, width: int
) -> None:
    layout = AnyRes(336, patch, grid_pinpoints(grid, 336)).layout(height, width)
    tokens = TileTokens.of(layout, 336 // patch)

    assert len(tokens.tiles) == layout.num_tiles - 1
    total = tokens.thumbnail + sum(tokens.tiles) + tokens.newlines
    assert total == layout.num_image_tokens


def test_a_middle_is_drawn_as_it_is_seen_and_costs_no_newline() -> None:
    processing = ImageProcessing(
        tile_size=336,
        patch_size=14,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        rescale_factor=1 / 255,
        image_grid_pinpoints=(),
        view="crop",
    )
    processor = ImageProcessor(processing)
    image = Image.new("RGB", (900, 300), "red")
    image.paste(BLUE, (300, 0, 600, 300))
    layout = processor.anyres.layout(300, 900)

    drawn = draw_tiles(image, layout, 24, "x", processor.middle(image))

    assert TileTokens.of(layout, 24) == TileTokens(576, (), 0)
    assert tile_picture._words(layout, TileTokens.of(layout, 24), "of which the middle is") == [
        "576 tokens = 576 thumbnail",
        "900 x 300 pixels, of which the middle is one tile",
    ]
    pixels = np.asarray(drawn)
    assert (pixels == BLUE).all(-1).sum() > 50_000
    assert not (pixels == (255, 0, 0)).all(-1).any()
    assert ImageProcessor(replace(processing, view="tiles")).middle(image) is None


def test_a_tile_counts_the_patches_of_it_that_are_kept() -> None:
    # 400x900 on 3x1: 54 rows of 24 are kept, 15 of the outer tiles and all of the inner one.
    tokens = TileTokens.of(STOCK.layout(900, 400), 24)
    assert tokens == TileTokens(576, (15 * 24, 576, 15 * 24), 54)


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (40, 30), (2000, 100), (5, 900)])
def test_picture_and_padding_lie_where_the_model_has_them(size: tuple[int, int]) -> None:
    layout = STOCK.layout(size[1], size[0])
    side = tile_picture._tile_side(layout)
    pixels = np.asarray(tile_picture._canvas(Image.new("RGB", size, BLUE), layout, side, 24))
    assert pixels.shape == (layout.rows * side, layout.columns * side, 3)

    is_padding = np.array([[tuple(p) in HATCH for p in row] for row in pixels[::5, ::5].tolist()])
    is_blue = (pixels[::5, ::5] == BLUE).all(-1)

    scale = 336 / side
    rows = np.arange(len(pixels))[::5] * scale
    columns = np.arange(pixels.shape[1])[::5] * scale
    # A pixel or two of the model either way, for rounding.
    inside = [
        (axis >= before + 2) & (axis < before + length - 2)
        for axis, before, length in (
            (rows, layout.pad_top, layout.resized_height),
            (columns, layout.pad_left, layout.resized_width),
        )
    ]
    outside = [
        (axis < before - 2) | (axis >= before + length + 2)
        for axis, before, length in (
            (rows, layout.pad_top, layout.resized_height),
            (columns, layout.pad_left, layout.resized_width),
        )
    ]
    within = np.outer(*inside)
    beyond = outside[0][:, None] | outside[1][None, :]
    # Grid and frame are drawn over both.
    assert not is_padding[within].any()
    assert not is_blue[beyond].any()
    assert is_blue[within].sum() >= 0.9 * within.sum()
    assert is_padding[beyond].sum() >= 0.9 * beyond.sum()
    assert within.any() or min(size) < 10


@settings(max_examples=30, deadline=None)
@given(
    grid=st.sampled_from(("base", "2x2", "2x6")),
    height=st.integers(1, 1500),
    width=st.integers(1, 1500),
)
def test_every_picture_can_be_drawn(grid: str, height: int, width: int) -> None:
    layout = AnyRes(336, 14, grid_pinpoints(grid, 336)).layout(height, width)
    drawn = draw_tiles(Image.new("RGB", (width, height), BLUE), layout, 24, "a name")

    assert drawn.mode == "RGB"
    assert max(drawn.size) < 2600


def test_drawings_are_stacked_whole() -> None:
    parts = [Image.new("RGB", (30, 10), "red"), Image.new("RGB", (20, 40), "blue")]
    sheet = stacked(parts)

    assert sheet.size == (30, 50)
    assert (sheet.getpixel((29, 9)), sheet.getpixel((0, 10))) == ((255, 0, 0), (0, 0, 255))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_a_picture_file_is_written_whole_and_over_nothing(tmp_path: Path) -> None:
    picture, path = Image.new("RGB", (4, 3), "red"), tmp_path / "a.png"
    PngFile(path).write(picture)
    assert size_of(path) == (4, 3)

    with pytest.raises(OutputExistsError, match="--force"):
        PngFile(path)
    PngFile(path, force=True).write(Image.new("RGB", (5, 5)))
    assert size_of(path) == (5, 5)
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.jpg", r"written as \.png"), ("no/a.png", "no folder"), ("folder.png", "is a folder")],
)
def test_a_path_that_cannot_be_is_refused_at_once(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RequestError, match=message):
        PngFile(tmp_path / name)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RequestError, match="no space left"):
        PngFile(tmp_path / "a.png").write(Image.new("RGB", (2, 2)))
    assert list(tmp_path.iterdir()) == []
