"""Faults of pixels and of the order of image tokens, planted in the runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from llava_edge.profiles.models.anyres import AnyRes, TileLayout
from llava_edge.runtime.artifact.manifest import ImageProcessing
from llava_edge.runtime.generation.inputs import input_embeds as prompt_embeddings
from llava_edge.runtime.processing import image_packing as image_features
from llava_edge.runtime.processing.images import image_processor
from llava_edge.runtime.processing.images.image_processor import ImageProcessor, ImageTiles
from llava_edge.runtime.processing.images.loading import convert_to_rgb
from tests.faults.fault import Fault

_Patch = pytest.MonkeyPatch
_Index = Callable[[TileLayout, int], NDArray[np.int64]]
_MEAN = (0.485, 0.456, 0.406)


def _processor(**values: Any) -> Callable[[_Patch], None]:
    """Other values than those of the manifest."""

    def plant(patch: _Patch) -> None:
        real = ImageProcessor.__init__

        def init(self: ImageProcessor, processing: ImageProcessing) -> None:
            real(self, replace(processing, **values))

        patch.setattr(ImageProcessor, "__init__", init)

    return plant


def _bgr(patch: _Patch) -> None:
    real = ImageProcessor._normalize

    def normalize(self: ImageProcessor, tile: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        real(self, tile[..., ::-1], out)

    patch.setattr(ImageProcessor, "_normalize", normalize)


def _resample(filter_: Image.Resampling) -> Callable[[_Patch], None]:
    def resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
        return np.asarray(image.resize((width, height), filter_))

    return lambda patch: patch.setattr(image_processor, "_resized", resized)


def _no_antialias(patch: _Patch) -> None:
    def resized(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        made = torch.nn.functional.interpolate(
            pixels, (height, width), mode="bicubic", antialias=False
        )
        return np.asarray(made[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy())

    patch.setattr(image_processor, "_resized", resized)


def _preprocess(
    *, squash: bool = False, shift: int = 0, order: Callable[[TileLayout], list[int]] | None = None
) -> Callable[[_Patch], None]:
    """Cut as the runtime does, but for one thing."""

    def preprocess(self: ImageProcessor, image: Image.Image) -> ImageTiles:
        image = convert_to_rgb(image)
        layout = self.anyres.layout(image.height, image.width)
        side, resized = self.anyres.tile_size, image_processor._resized
        pixels = np.empty((layout.num_tiles, 3, side, side), np.float32)
        self._normalize(resized(image, side, side), pixels[0])
        canvas = np.zeros((layout.rows * side, layout.columns * side, 3), np.uint8)
        if layout.rows and squash:
            canvas[...] = resized(image, *canvas.shape[:2])
        elif layout.rows:
            top, left = layout.pad_top, layout.pad_left
            height, width = layout.resized_height, layout.resized_width
            canvas[top : top + height, left : left + width] = resized(image, height, width)
        canvas = np.roll(canvas, shift, axis=1)
        for index in range(layout.rows * layout.columns):
            row, column = divmod(index, layout.columns)
            part = canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]
            self._normalize(part, pixels[index + 1])
        if order is not None and layout.rows:
            pixels = pixels[order(layout)]
        return ImageTiles(pixels, layout)

    return lambda patch: patch.setattr(ImageProcessor, "preprocess", preprocess)


def _by_columns(layout: TileLayout) -> list[int]:
    places = np.arange(layout.rows * layout.columns).reshape(layout.rows, layout.columns)
    return [0, *(1 + places.T.reshape(-1)).tolist()]


def _thumbnail_last(layout: TileLayout) -> list[int]:
    return [*range(1, layout.num_tiles), 0]


def _packed(index: _Index) -> Callable[[_Patch], None]:
    """Other rows, and as many tokens as there are then."""

    def plant(patch: _Patch) -> None:
        real = AnyRes.layout

        def layout(self: AnyRes, height: int, width: int) -> TileLayout:
            found = real(self, height, width)
            count = len(index(found, self.patches_per_side)) if found.rows else None
            return found if count is None else replace(found, num_image_tokens=count)

        def packing(layout: TileLayout, side: int) -> NDArray[np.int64]:
            return index(layout, side) if layout.rows else _REAL(layout, side)

        patch.setattr(AnyRes, "layout", layout)
        patch.setattr(prompt_embeddings, "packing_index", packing)

    return plant


_REAL = image_features.packing_index


def _split(layout: TileLayout, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Thumbnail, and the kept rows with their newline behind them."""
    found = _REAL(layout, side)
    count = side * side
    return found[:count], found[count:].reshape(layout.kept_rows, layout.kept_columns + 1)


def _without_newlines(layout: TileLayout, side: int) -> NDArray[np.int64]:
    thumbnail, rows = _split(layout, side)
    return np.concatenate([thumbnail, rows[:, :-1].ravel()])


def _newline_per_tile(layout: TileLayout, side: int) -> NDArray[np.int64]:
    count = side * side
    newline = layout.num_tiles * count
    tiles = np.arange(count, newline).reshape(-1, count)
    ends = np.full((len(tiles), 1), newline)
    return np.concatenate([np.arange(count), np.concatenate([tiles, ends], 1).ravel()])


def _not_unpadded(layout: TileLayout, side: int) -> NDArray[np.int64]:
    whole = replace(
        layout,
        first_row=0,
        kept_rows=layout.rows * side,
        first_column=0,
        kept_columns=layout.columns * side,
    )
    return _REAL(whole, side)


def _unpadded_one_off(layout: TileLayout, side: int) -> NDArray[np.int64]:
    moved = replace(
        layout,
        first_row=max(0, layout.first_row - 1),
        first_column=max(0, layout.first_column - 1),
    )
    return _REAL(moved, side)


def _rows_and_columns_swapped(layout: TileLayout, side: int) -> NDArray[np.int64]:
    thumbnail, rows = _split(layout, side)
    turned = rows[:, :-1].T
    newlines = np.full((len(turned), 1), layout.num_tiles * side * side)
    return np.concatenate([thumbnail, np.concatenate([turned, newlines], 1).ravel()])


def _newline_first(layout: TileLayout, side: int) -> NDArray[np.int64]:
    thumbnail, rows = _split(layout, side)
    return np.concatenate([thumbnail, np.roll(rows, 1, axis=1).ravel()])


def _tokens_of_thumbnail_last(layout: TileLayout, side: int) -> NDArray[np.int64]:
    thumbnail, rows = _split(layout, side)
    return np.concatenate([rows.ravel(), thumbnail])


def _pixels(id_: str, wrong: str, plant: Callable[[_Patch], None]) -> Fault:
    return Fault(id_, "image processing", wrong, "runtime", "preprocessing", plant)


def _packing(id_: str, wrong: str, index: _Index) -> Fault:
    return Fault(id_, "packing", wrong, "runtime", "packing", _packed(index))


FAULTS = (
    _pixels("bgr", "colours are read as blue, green, red", _bgr),
    _pixels("wrong mean", "ImageNet's mean in place of CLIP's", _processor(image_mean=_MEAN)),
    _pixels("rescale 1/256", "values over 256, not 255", _processor(rescale_factor=1 / 256)),
    _pixels("bilinear", "bilinear for bicubic", _resample(Image.Resampling.BILINEAR)),
    _pixels("no antialias", "bicubic without a wider filter when shrinking", _no_antialias),
    _pixels("squashed", "the image fills the grid, not padded", _preprocess(squash=True)),
    _pixels("crop offset", "tiles are cut one pixel to the left", _preprocess(shift=1)),
    _pixels("tiles transposed", "tiles column by column", _preprocess(order=_by_columns)),
    _pixels("thumbnail last", "the thumbnail behind the tiles", _preprocess(order=_thumbnail_last)),
    _packing("no newline", "rows end without a newline", _without_newlines),
    _packing("newline per tile", "a newline ends each tile, not each row", _newline_per_tile),
    _packing("no unpadding", "features of the padding are kept", _not_unpadded),
    _packing("unpadding off by one", "a row of padding for a row of the image", _unpadded_one_off),
    _packing("rows and columns", "patches column by column", _rows_and_columns_swapped),
    _packing("newline first", "the newline opens a row", _newline_first),
    _packing(
        "thumbnail tokens last", "tokens of the thumbnail come last", _tokens_of_thumbnail_last
    ),
)
