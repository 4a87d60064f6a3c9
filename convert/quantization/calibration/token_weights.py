"""Kinds of prompt tokens, and how much each kind counts in calibration.

An image brings thousands of tokens beside some tens of text, so an unweighted Hessian is one of
image tokens. Yet a language model's answers depend far less on each of them: MBQ (arXiv
2412.19509) finds vision tokens much less sensitive than text tokens and balances the two in the
calibration loss; VLMQ (arXiv 2508.03351) finds plain GPTQ Hessians dominated by redundant vision
tokens. Here each kind that occurs contributes a fixed share of the whole, whatever its number:
half for text, half for what an image brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.models.anyres import TileLayout
from llava_edge.runtime.processing.image_packing import packing_index
from llava_edge.runtime.util.arrays import Array

KINDS = ("text", "base", "tile", "newline")
"""Text; the thumbnail's patches; the tiles' patches; the newline behind each row of them."""
TEXT, BASE, TILE, NEWLINE = range(4)

Kinds = NDArray[np.uint8]


@dataclass(frozen=True)
class KindShares:
    """Share of each kind in the Hessians; those of absent kinds go to the others in proportion.

    Raises:
        RequestError: a share is negative or not finite, or none is positive.
    """

    text: float = 0.5
    base: float = 0.2
    tile: float = 0.27
    newline: float = 0.03

    def __post_init__(self) -> None:
        shares = list(asdict(self).values())
        if not all(0 <= share < float("inf") for share in shares) or not any(shares):
            raise RequestError(
                f"shares of token kinds are {asdict(self)}; they must be finite, not negative, and "
                "not all zero"
            )


def token_kinds(
    ids: Array, image_token_id: int, layouts: Sequence[TileLayout], patches_per_side: int
) -> Kinds:
    """Kind of each position of a prompt.

    Args:
        ids: int64 [tokens], each image as many ids as it costs.
        image_token_id: the id that marks image positions.
        layouts: geometry of each image, in order of appearance.
        patches_per_side: patches along one side of a tile.

    Returns:
        uint8 [tokens], places in ``KINDS``.
    """
    kinds = np.full(ids.shape, TEXT, np.uint8)
    parts = [_image_kinds(layout, patches_per_side) for layout in layouts]
    if parts:
        kinds[ids == image_token_id] = np.concatenate(parts)
    return kinds


def count_kinds(kinds: Kinds) -> dict[str, int]:
    """Tokens of each kind."""
    counts = np.bincount(kinds, minlength=len(KINDS)).tolist()
    return dict(zip(KINDS, counts, strict=True))


def token_weights(kinds: Kinds, shares: KindShares) -> NDArray[np.float64]:
    """Weight of each token, 1 on average, such that each kind adds up to its share.

    Raises:
        RequestError: only kinds of share 0 occur.
    """
    counts = np.bincount(kinds, minlength=len(KINDS)).astype(np.float64)
    wanted = np.array([getattr(shares, kind) for kind in KINDS]) * (counts > 0)
    if not wanted.sum() > 0:
        raise RequestError(
            f"the samples hold {count_kinds(kinds)} tokens, and every kind among them has share 0 "
            f"({asdict(shares)}); nothing is left to calibrate with"
        )
    each = wanted / wanted.sum() / np.maximum(counts, 1.0) * counts.sum()
    weights: NDArray[np.float64] = each[kinds]
    return weights


def spread_rows(kinds: Kinds, rows_of_a_kind: int) -> NDArray[np.bool_]:
    """Mask of at most ``rows_of_a_kind`` tokens of each kind, evenly spread over all of them."""
    chosen = np.zeros(kinds.shape, np.bool_)
    for kind in range(len(KINDS)):
        places = np.flatnonzero(kinds == kind)
        count = min(rows_of_a_kind, len(places))
        chosen[places[np.arange(count) * len(places) // max(count, 1)]] = True
    return chosen


def _image_kinds(layout: TileLayout, patches_per_side: int) -> Kinds:
    index = packing_index(layout, patches_per_side)
    newline = layout.num_tiles * patches_per_side**2
    kinds = np.full(index.shape, TILE, np.uint8)
    kinds[: patches_per_side**2] = BASE
    kinds[index == newline] = NEWLINE
    return kinds
