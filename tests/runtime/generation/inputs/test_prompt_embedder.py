"""What stands in the matrix of features, shown with an encoder that writes what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llava_edge.convert.onnx.embeddings import write_embeddings
from llava_edge.profiles.models.anyres import AnyRes
from llava_edge.profiles.models.model_dims import ModelDims, TextDims, VisionDims
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing.request import Medium, Request
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.opened_file import OpenedFile

IMAGE = 6
HIDDEN = 4
PATCHES = 4  # of a tile of 28 pixels with patches of 14
DIMS = ModelDims(
    "llava_next",
    VisionDims(4, 8, 2, 2, 28, 14, 1e-5, "quick_gelu", (1,), "gelu", True),
    TextDims(
        "llama", 7, 4, 8, 1, 2, 2, 2, 1e-6, 1e4, 1.0, 64, "silu", False, False, False, (0,), False
    ),
    ((28, 56),),
    IMAGE,
    None,
)


class Encoder:
    """Every patch of a tile reads as the tile's first pixel."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, pixel_values: Array, out: Array) -> None:
        self.calls.append(len(pixel_values))
        out[...] = pixel_values[:, 0, 0, 0][:, None, None]


@pytest.fixture
def table(tmp_path: Path) -> Iterator[EmbeddingTable]:
    rows = np.arange(7, dtype=np.float32)[:, None] + 100 + np.zeros((7, HIDDEN), np.float32)
    write_embeddings(tmp_path / "embeddings.safetensors", [rows], np.full(HIDDEN, 9.0))
    with EmbeddingTable(OpenedFile(tmp_path / "embeddings.safetensors"), DIMS) as opened:
        yield opened


def tiles(*values: int) -> NDArray[np.float32]:
    pixels = np.zeros((len(values), 3, 28, 28), np.float32)
    pixels[:, 0, 0, 0] = values
    return pixels


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_features_are_the_tiles_of_all_images_and_the_newline_row(
    table: EmbeddingTable, dtype: type[np.float32] | type[np.float16]
) -> None:
    embedder, said = PromptEmbedder(DIMS, IMAGE, table, Encoder(), dtype), []

    found = embedder.features(
        [tiles(1, 2, 3), tiles(4, 5)], lambda stage, done, total: said.append((stage, done, total))
    )

    assert found.dtype == dtype
    assert found.shape == (5 * PATCHES + 1, HIDDEN)
    assert found[:, 0].tolist() == [k for k in (1, 2, 3, 4, 5) for _ in range(PATCHES)] + [9]
    assert said == [("tiles", 0, 5), ("tiles", 3, 5), ("tiles", 5, 5)]


@pytest.mark.parametrize(
    ("size", "calls"),
    [
        (None, [3, 1, 2]),
        (1, [1, 1, 1, 1, 1, 1]),
        (2, [2, 2, 2]),
        (4, [4, 2]),
        (5, [5, 1]),
        (8, [6]),
    ],
)
def test_tiles_of_several_images_share_a_batch(
    table: EmbeddingTable, size: int | None, calls: list[int]
) -> None:
    encoder, said = Encoder(), []
    embedder = PromptEmbedder(DIMS, IMAGE, table, encoder, np.float32, size)

    found = embedder.features(
        [tiles(1, 2, 3), tiles(4), tiles(5, 6)], lambda stage, done, total: said.append(done)
    )

    assert encoder.calls == calls
    assert found[:, 0].tolist() == [k for k in range(1, 7) for _ in range(PATCHES)] + [9]
    assert said == [sum(calls[:n]) for n in range(len(calls) + 1)]


def test_a_batch_within_one_image_is_no_copy(table: EmbeddingTable) -> None:
    image, seen = tiles(1, 2, 3, 4), []

    class Keeping(Encoder):
        def encode(self, pixel_values: Array, out: Array) -> None:
            seen.append(np.shares_memory(pixel_values, image))

    PromptEmbedder(DIMS, IMAGE, table, Keeping(), np.float32, 2).features([image, tiles(5)])
    assert seen == [True, True, False]


def test_without_images_the_encoder_is_not_asked(table: EmbeddingTable) -> None:
    encoder = Encoder()
    embedder = PromptEmbedder(DIMS, IMAGE, table, encoder, np.float32)
    rows = np.empty((3, HIDDEN), np.float32)

    embedder.embed(Request(np.array([1, 5, 2]))).fill(0, 3, rows)

    assert encoder.calls == []
    assert rows[:, 0].tolist() == [101, 105, 102]


def test_image_positions_read_features_and_the_others_the_table(table: EmbeddingTable) -> None:
    layout = AnyRes(28, 14, ((28, 56),)).layout(28, 56)
    ids = np.array([1, *[IMAGE] * layout.num_image_tokens, 3])
    embedder = PromptEmbedder(DIMS, IMAGE, table, Encoder(), np.float32)
    rows = np.empty((len(ids), HIDDEN), np.float32)

    medium = Medium(1, layout.num_image_tokens, layout, pixels=tiles(1, 2, 3))

    embedder.embed(Request(ids, (medium,))).fill(0, len(ids), rows)

    # The thumbnail, then two rows of the two tiles side by side, each with its newline.
    packed = [*[1] * 4, *[2, 2, 3, 3, 9] * 2]
    assert rows[:, 0].tolist() == [101, *packed, 103]
