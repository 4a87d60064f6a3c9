"""Packed order is the reference's, shown with features that carry their own row number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava_edge.profiles.models.anyres import AnyRes, grid_pinpoints
from llava_edge.runtime.processing.image_packing import packing_index

STOCK = AnyRes(336, 14, grid_pinpoints("2x2", 336))
LARGE = AnyRes(84, 14, grid_pinpoints("2x6", 84))
ODD = AnyRes(70, 14, ((210, 70), (70, 70), (140, 350), (70, 280), (210, 210)))
GEOMETRIES = {"stock": STOCK, "tile84-2x6": LARGE, "odd-patches-tile70": ODD}


def reference_packing(geometry: AnyRes, height: int, width: int) -> Any:
    """Rows as the library packs them; the newline carries the number behind the last row."""
    num_tiles = geometry.layout(height, width).num_tiles
    patches = geometry.patches_per_side**2
    count = num_tiles * patches
    model: Any = SimpleNamespace(
        config=SimpleNamespace(
            image_grid_pinpoints=[list(point) for point in geometry.candidates],
            vision_config=SimpleNamespace(
                image_size=geometry.tile_size, patch_size=geometry.patch_size
            ),
        )
    )
    rows = torch.arange(count, dtype=torch.float64)
    tagged = torch.stack((rows, -rows), dim=-1).reshape(num_tiles, patches, 2)
    newline = torch.tensor([count, -count], dtype=torch.float64)
    packed, lengths = LlavaNextModel.pack_image_features(
        model, [tagged], torch.tensor([[height, width]]), "default", image_newline=newline
    )
    assert lengths.tolist() == [len(packed[0])]
    assert torch.equal(packed[0][:, 0], -packed[0][:, 1])
    return packed[0][:, 0].numpy().astype(np.int64)


SIZES = [
    (1, 1),
    (1, 2000),
    (2000, 1),
    (10, 1000),
    (1000, 10),
    (100, 2000),
    (2000, 100),
    (200, 300),
    (300, 200),
    (336, 336),
    (337, 337),
    (335, 673),
    (400, 600),
    (600, 400),
    (899, 1024),
    (1024, 340),
    (500, 1500),
    (1500, 500),
    (352, 748),
    (748, 352),
    (88, 55),
]


@pytest.mark.parametrize(("height", "width"), SIZES, ids=[f"{h}x{w}" for h, w in SIZES])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_packed_order_is_the_reference_order(geometry: AnyRes, height: int, width: int) -> None:
    layout = geometry.layout(height, width)
    index = packing_index(layout, geometry.patches_per_side)
    assert index.dtype == np.int64
    assert len(index) == layout.num_image_tokens
    assert np.array_equal(index, reference_packing(geometry, height, width))


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    geometry=st.sampled_from([STOCK, LARGE, ODD]),
)
def test_packed_order_is_the_reference_order_at_any_size(
    height: int, width: int, geometry: AnyRes
) -> None:
    index = packing_index(geometry.layout(height, width), geometry.patches_per_side)
    assert np.array_equal(index, reference_packing(geometry, height, width))


def test_a_strip_that_keeps_no_row_leaves_the_thumbnail_alone() -> None:
    index = packing_index(STOCK.layout(10, 1000), 24)
    assert np.array_equal(index, np.arange(576))


def test_a_strip_that_keeps_no_column_leaves_the_newlines() -> None:
    index = packing_index(STOCK.layout(1000, 10), 24)
    assert np.array_equal(index[:576], np.arange(576))
    assert index[576:].tolist() == [4 * 576] * 72


@pytest.mark.parametrize(("tile", "patch"), [(336, 14), (70, 14), (84, 14)])
def test_base_grid_is_the_thumbnail_and_a_newline(tile: int, patch: int) -> None:
    base = AnyRes(tile, patch, ())
    index = packing_index(base.layout(480, 640), base.patches_per_side)
    # The branch of the reference that packs a single tile.
    assert np.array_equal(index, reference_packing(base, 480, 640))
    assert len(index) == base.max_image_tokens


def test_two_by_two_patches_by_hand() -> None:
    # Tiles of 2x2 patches on a 1x2 grid: thumbnail 0-3, left tile 4-7, right tile 8-11.
    layout = AnyRes(28, 14, ((28, 56),)).layout(28, 56)
    expected = [0, 1, 2, 3, 4, 5, 8, 9, 12, 6, 7, 10, 11, 12]
    assert packing_index(layout, 2).tolist() == expected
