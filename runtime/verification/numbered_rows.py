"""Numbered rows: what stands where in a prompt, told by features that are numbers.

Tower and projector are replaced by a class that numbers tiles by their content and rows in turn. So
order, gaps and repetitions show exactly, whatever the weights, and at the cost of a few hashes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np

from llava_edge.runtime.artifact.manifest import Manifest
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.processing.request import Request
from llava_edge.runtime.processing.tile_pixels import digest_tiles
from llava_edge.runtime.util.arrays import Array

NEWLINE_NUMBERS = np.array([-1.0, -1.0], np.float32)
"""What stands for the newline's row among ``tile_numbers``."""
_APART = 8


class _Numbering:
    """Stands for tower and projector: features say which tile and which row they are."""

    def encode(self, pixel_values: Array, out: Array) -> None:
        out[...] = tile_numbers(pixel_values, out.shape[1])


class _NoTable:
    """Stands for the embedding table of such features."""

    image_newline = NEWLINE_NUMBERS

    def rows(self, ids: Array, *, out: Array) -> Array:
        out[...] = 0
        return out


def numbered_rows(manifest: Manifest, request: Request) -> Array:
    """What stands at each position where ``tile_numbers`` are the features, float32 (tokens, 2)."""
    tokens, dims = manifest.tokens, manifest.model
    embedder = PromptEmbedder(
        replace(dims, text=replace(dims.text, hidden_size=2)),
        tokens.image,
        cast(EmbeddingTable, _NoTable()),
        _Numbering(),
        np.float32,
        batch_tiles=2,
        video_token_id=tokens.video,
    )
    found = np.empty((request.num_tokens, 2), np.float32)
    embedder.embed(request).fill(0, len(found), found)
    return found


def tile_numbers(pixels: Array, rows: int) -> Array:
    """In place of features: a number that the tile's content gives, and the number of the row.

    Args:
        pixels: of tiles or frames (n, 3, T, T).
        rows: of features that each has.

    Returns:
        float32 (n, rows, 2), whole numbers.
    """
    found = np.empty((len(pixels), rows, 2), np.float32)
    # Some pixels of each suffice to tell tiles apart.
    for tile, content in zip(found, digest_tiles(pixels[..., ::_APART, ::_APART]), strict=True):
        tile[:, 0] = int.from_bytes(content[:3], "little")
    found[..., 1] = np.arange(rows)
    return found
