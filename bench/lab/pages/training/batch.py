"""Batch: samples as arrays, all questions of a page behind one copy of its image tokens.

A sequence is ``<s>[INST]<image>…`` with a newline and then, for each question, its text,
``[/INST]``, the answer and ``</s>``. A question sees the image and itself, and its positions go on
from the image's end, so each reads as if it stood alone: eight for the price of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llava_edge.bench.lab.pages.drawing.geometry import PATCHES, PROCESSING
from llava_edge.bench.lab.pages.drawing.page import COLOURS, SIGNS, Page, Question
from llava_edge.bench.lab.pages.drawing.sample import Sample
from llava_edge.bench.lab.pages.training.tokenizer import ASK, BOS, EOS, REPLY
from llava_edge.profiles.models.anyres import TileLayout
from llava_edge.runtime.processing.images.image_processor import ImageProcessor
from llava_edge.runtime.util.arrays import Array

IGNORED = -100
"""Label of a position that no loss counts, as in torch."""
NEWLINE = -2
"""Source of a position that holds the image newline."""
TEXT = -1
"""Source of a position that holds a text token."""
NUM_PLACES = 5
"""Labels of a cell beside sign and colour: row, column and the mark's three places."""

_PROCESSOR = ImageProcessor(PROCESSING)
_COLOUR_NAMES = tuple(COLOURS)
_LONG_ANSWER = 5.0
"""Answers up to this many tokens weigh the same a token; longer ones as much as this many."""


@dataclass(frozen=True)
class Batch:
    """Sequences, padded on the right; B of them, S positions.

    Attributes:
        pixel_values: float32 (tiles, 3, tile, tile) of all pages.
        source: (B, S), the row of all tiles' features that stands there, or NEWLINE or TEXT.
        ids: (B, S) token ids, 0 where an image or nothing stands.
        positions: (B, S), for the rotary embedding.
        blocks: (B, S), 0 the image, from 1 on the questions, -1 padding.
        targets: (B, S), id of the next token where it belongs to an answer, else IGNORED.
        weights: float32 (B, S), of each target in the loss.
        signs, colours: (B, S), of a cell of the page, 0 where it is empty; IGNORED elsewhere.
        places: (B, S, NUM_PLACES), row and column of a cell, and its mark's places; likewise.
    """

    pixel_values: NDArray[np.float32]
    source: NDArray[np.int64]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    blocks: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    signs: NDArray[np.int64]
    colours: NDArray[np.int64]
    places: NDArray[np.int64]


def encode_sample(sample: Sample, tokenizer: Tokenizer) -> Batch:
    """Pixels, tokens and labels of one page and its questions, a batch of one."""
    tiles = _PROCESSOR.preprocess(sample.image)
    head = _text_ids(tokenizer, BOS + ASK)
    image = _image_sources(tiles.layout)
    source = [TEXT, TEXT, *image, TEXT]
    ids = [*head, *[0] * len(image), *_text_ids(tokenizer, "\n")]
    positions = list(range(len(ids)))
    blocks = [0] * len(ids)
    targets = [IGNORED] * len(ids)
    weights = [0.0] * len(ids)
    for number, question in enumerate(sample.questions, start=1):
        tokens, answer = _question_ids(tokenizer, question)
        weight = min(1.0, _LONG_ANSWER / len(answer))
        all_ids = [*tokens, *answer]
        after = len(image) + 3
        ids += all_ids[:-1]
        source += [TEXT] * (len(all_ids) - 1)
        positions += range(after, after + len(all_ids) - 1)
        blocks += [number] * (len(all_ids) - 1)
        targets += [IGNORED] * (len(tokens) - 1) + answer
        weights += [0.0] * (len(tokens) - 1) + [weight] * len(answer)
    signs, colours, places = _cell_labels(sample.page, len(ids))
    return Batch(
        pixel_values=np.asarray(tiles.pixel_values),
        source=np.array([source], np.int64),
        ids=np.array([ids], np.int64),
        positions=np.array([positions], np.int64),
        blocks=np.array([blocks], np.int64),
        targets=np.array([targets], np.int64),
        weights=np.array([weights], np.float32),
        signs=signs[None],
        colours=colours[None],
        places=places[None],
    )


def collate(batches: Sequence[Batch]) -> Batch:
    """Put batches together; feature rows count on over the tiles of all pages."""
    length = max(batch.ids.shape[1] for batch in batches)
    first_feature = np.cumsum([0] + [PATCHES * len(batch.pixel_values) for batch in batches])
    moved = [
        np.where(batch.source >= 0, batch.source + first, batch.source)
        for batch, first in zip(batches, first_feature[:-1], strict=True)
    ]

    def padded(arrays: Sequence[Array], value: float) -> Array:
        rows = []
        for array in arrays:
            missing = [(0, 0), (0, length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
            rows.append(np.pad(array, missing, constant_values=value))
        return np.concatenate(rows)

    return Batch(
        pixel_values=np.concatenate([batch.pixel_values for batch in batches]),
        source=padded(moved, TEXT),
        ids=padded([batch.ids for batch in batches], 0),
        positions=padded([batch.positions for batch in batches], 0),
        blocks=padded([batch.blocks for batch in batches], -1),
        targets=padded([batch.targets for batch in batches], IGNORED),
        weights=padded([batch.weights for batch in batches], 0),
        signs=padded([batch.signs for batch in batches], IGNORED),
        colours=padded([batch.colours for batch in batches], IGNORED),
        places=padded([batch.places for batch in batches], IGNORED),
    )


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _question_ids(tokenizer: Tokenizer, question: Question) -> tuple[list[int], list[int]]:
    return (
        _text_ids(tokenizer, question.text + REPLY),
        _text_ids(tokenizer, question.answer + EOS),
    )


def _image_sources(layout: TileLayout) -> list[int]:
    """Feature rows of an image in the order in which the model sees them."""
    side = int(PATCHES**0.5)
    sources = list(range(PATCHES))
    for row in range(layout.first_row, layout.first_row + layout.kept_rows):
        for column in range(layout.first_column, layout.first_column + layout.kept_columns):
            tile = 1 + (row // side) * layout.columns + column // side
            sources.append(tile * PATCHES + (row % side) * side + column % side)
        sources.append(NEWLINE)
    return sources


def _cell_labels(
    page: Page, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    signs = np.full(length, IGNORED, np.int64)
    colours = np.full(length, IGNORED, np.int64)
    places = np.full((length, NUM_PLACES), IGNORED, np.int64)
    for row in range(page.rows):
        for column in range(page.columns):
            at = 2 + PATCHES + row * (page.columns + 1) + column
            mark = page.marks.get((row, column))
            signs[at] = 1 + SIGNS.index(mark.sign) if mark else 0
            colours[at] = 1 + _COLOUR_NAMES.index(mark.colour) if mark else 0
            places[at] = (row, column, *(mark.places if mark else (0, 0, 0)))
    return signs, colours, places
