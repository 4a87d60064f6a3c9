"""What the decoder reads at each position, shown with features that carry their own row number."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.runtime.generation.inputs.input_embeds import PromptEmbeddings
from llava_edge.runtime.util.arrays import Array

ODD = AnyRes(70, 14, ((70, 140), (140, 70), (140, 140), (210, 70), (70, 210)))
STOCK = AnyRes(336, 14, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
IMAGE = 7
TEXT_BASE = 1_000_000.0
"""Text id k reads as TEXT_BASE + k, so that it is never mistaken for a feature row."""


class Table:
    """Embedding rows that say which id they are of."""

    def rows(self, ids: Array, *, out: Array) -> Array:
        out[...] = (TEXT_BASE + ids)[:, None]
        return out


def reference_rows(geometry: AnyRes, sizes: list[tuple[int, int]]) -> list[Array]:
    """Packed rows of several images, by the library; the newline is −1."""
    patches = geometry.patches_per_side**2
    features, start = [], 0
    for height, width in sizes:
        count = geometry.layout(height, width).num_tiles * patches
        tagged = torch.arange(start, start + count, dtype=torch.float64)
        features.append(tagged.reshape(-1, patches, 1))
        start += count
    model: Any = SimpleNamespace(
        config=SimpleNamespace(
            image_grid_pinpoints=[list(point) for point in geometry.candidates],
            vision_config=SimpleNamespace(
                image_size=geometry.tile_size, patch_size=geometry.patch_size
            ),
        )
    )
    newline = torch.tensor([-1.0], dtype=torch.float64)
    packed, _ = LlavaNextModel.pack_image_features(
        model, features, torch.tensor(sizes), "default", image_newline=newline
    )
    return [rows[:, 0].numpy() for rows in packed]


@pytest.mark.parametrize("geometry", [STOCK, ODD], ids=["stock", "odd"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 512, 100_000])
@pytest.mark.parametrize(
    "sizes",
    [
        [(480, 640)],
        [(480, 640), (640, 480)],
        [(10, 1000), (333, 250), (1000, 10), (50, 60)],
    ],
    ids=["one", "two", "four with strips"],
)
def test_text_and_images_stand_where_the_reference_puts_them(
    geometry: AnyRes, chunk: int, sizes: list[tuple[int, int]]
) -> None:
    if chunk == 1 and geometry is STOCK:
        chunk = 13
    layouts = [geometry.layout(height, width) for height, width in sizes]
    patches = geometry.patches_per_side**2
    total = sum(layout.num_tiles for layout in layouts) * patches
    features = np.append(np.arange(total, dtype=np.float32), np.float32(-1))[:, None]
    # Text before, between and behind; two images touch.
    ids: list[int] = [100, 101]
    expected: list[float] = [TEXT_BASE + 100, TEXT_BASE + 101]
    for index, (layout, rows) in enumerate(
        zip(layouts, reference_rows(geometry, sizes), strict=True)
    ):
        ids += [IMAGE] * layout.num_image_tokens
        expected += rows.tolist()
        if index != 0:
            ids.append(200 + index)
            expected.append(TEXT_BASE + 200 + index)
    embeddings = PromptEmbeddings(
        np.array(ids), IMAGE, layouts, geometry.patches_per_side, features, Table()
    )

    got = np.empty((len(ids), 1), np.float32)
    for start in range(0, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        embeddings.fill(start, stop, got[start:stop])

    np.testing.assert_array_equal(got[:, 0], np.array(expected, np.float32))


def test_text_alone_needs_no_features() -> None:
    ids = np.array([5, 6, 8])
    embeddings = PromptEmbeddings(ids, IMAGE, (), 5, np.zeros((1, 2), np.float32), Table())
    out = np.empty((2, 2), np.float32)

    embeddings.fill(1, 3, out)

    np.testing.assert_array_equal(out, [[TEXT_BASE + 6] * 2, [TEXT_BASE + 8] * 2])
