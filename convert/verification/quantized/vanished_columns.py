"""VanishedColumns: inputs that a quantised layer ignores and the checkpoint's weight does not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.verification.quantized.graph_weights import GraphCodes

_FLOOR = 2.0**-13
"""A group with a scale this small is all but zero, and the smallest scale need not fit it."""


class VanishedColumns:
    """Adds up what columns without a single code hold in the checkpoint, over blocks of outputs.

    Args:
        codes: the whole layer.
    """

    def __init__(self, codes: GraphCodes) -> None:
        self._codes = codes
        self._empty = _empty_columns(codes)
        self._lost_steps = np.zeros(len(self._empty))

    def add(self, rows: slice, original: NDArray[np.float32]) -> None:
        """Take some outputs, float32 [rows, K] of the checkpoint."""
        part = self._codes.cut(rows)
        scales = part.scales.astype(np.float32)
        steps = np.maximum(scales[:, self._empty // part.block_size], _FLOOR)
        self._lost_steps += (np.abs(original[:, self._empty]) / steps).sum(0, np.float64)

    def count(self) -> int:
        """Columns whose originals are a step or more, on average: rounding leaves none."""
        return int((self._lost_steps > len(self._codes.codes)).sum())


def _empty_columns(codes: GraphCodes) -> NDArray[np.int64]:
    """Columns that are zero in every row."""
    if not isinstance(codes.zeros, int):
        return np.zeros(0, np.int64)
    # The first rows settle it for nearly all columns.
    candidates = np.flatnonzero((codes.codes[:256] == codes.zeros).all(axis=0))
    empty: NDArray[np.int64] = candidates[(codes.codes[:, candidates] == codes.zeros).all(axis=0)]
    return empty
