"""WeightError: how far a layer's quantised weights lie from the checkpoint's, by three measures.

    relative    ||Ŵ - W|| / ||W||, over the layer (Frobenius); codes of another place reach 1
    scale       share of that error which one factor a group explains: the part of Ŵ - W along W in
                each group, again as a norm; a wrong scale makes nearly all of it, rounding little
    shift       |mean of (Ŵ - W) / scale| over the layer: what a wrong zero point moves

Rounding to nearest and GPTQ both move single weights, by half a step or by several; neither scales
a group nor shifts a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava_edge.convert.verify.graph_weights import GraphCodes

_FLOOR = 2.0**-13
"""A group with a scale this small is all but zero, and the smallest scale need not fit it."""
_NEGLIGIBLE = 1e-3
"""Below this relative error nothing is asked of its kind: the original was on a grid itself."""


@dataclass(frozen=True)
class WeightError:
    """The three measures of one layer.

    ``num_dead`` columns were left out: the solver sets inputs that never occurred to zero.
    """

    relative: float
    scale: float
    shift: float
    num_dead: int = 0


class ErrorSum:
    """Adds up the error of a layer over blocks of its outputs.

    Args:
        codes: the whole layer.
        num_dead: most columns that the solver set to zero because calibration never met them.
    """

    def __init__(self, codes: GraphCodes, num_dead: int = 0) -> None:
        self._codes = codes
        self._empty = _empty_columns(codes)
        # More than were recorded are none of the solver's, and stay in the error.
        self._dead = self._empty if len(self._empty) <= num_dead else self._empty[:0]
        self._lost_steps = np.zeros(len(self._empty))
        self._squared = 0.0
        self._norm = 0.0
        self._along = 0.0
        self._shift = 0.0

    def add(self, rows: slice, original: NDArray[np.float32]) -> None:
        """Take some outputs.

        Args:
            rows: which.
            original: float32 [rows, K], the checkpoint's; overwritten.
        """
        part = self._codes.cut(rows)
        scales = part.scales.astype(np.float32)
        steps = np.maximum(scales[:, self._empty // part.block_size], _FLOOR)
        self._lost_steps += (np.abs(original[:, self._empty]) / steps).sum(0, np.float64)
        original[:, self._dead] = 0.0
        error = part.dequantize()
        error -= original
        self._squared += float(np.vdot(error, error))
        self._norm += float(np.vdot(original, original))
        error, original = (_in_blocks(values, part.block_size) for values in (error, original))
        energy = np.einsum("ngk,ngk->ng", original, original)
        along = np.einsum("ngk,ngk->ng", error, original)
        # A group of zeros must come out as zeros: then error and energy are both 0.
        fits = scales > _FLOOR
        with np.errstate(divide="ignore", invalid="ignore"):
            along = np.where(fits & (energy > 0), along * along / energy, 0.0)
            shifts = error.sum(axis=2) / scales
        self._along += float(along.sum(dtype=np.float64))
        self._shift += float(shifts.sum(dtype=np.float64))

    def vanished(self) -> int:
        """Columns without a code whose originals are a step or more, on average: not rounding."""
        return int((self._lost_steps > len(self._codes.codes)).sum())

    def result(self) -> WeightError:
        """The measures over all that was taken."""
        relative = math.sqrt(self._squared / self._norm) if self._norm else math.inf
        if not self._squared:
            relative = 0.0
        shift = abs(self._shift) / max(1, self._codes.codes.size)
        scale = math.sqrt(self._along / self._squared) if self._squared else 0.0
        scale = 0.0 if relative < _NEGLIGIBLE else scale
        return WeightError(relative, scale, shift, len(self._dead))


def _empty_columns(codes: GraphCodes) -> NDArray[np.int64]:
    """Columns that are zero in every row."""
    if not isinstance(codes.zeros, int):
        return np.zeros(0, np.int64)
    # The first rows settle it for nearly all columns.
    candidates = np.flatnonzero((codes.codes[:256] == codes.zeros).all(axis=0))
    empty: NDArray[np.int64] = candidates[(codes.codes[:, candidates] == codes.zeros).all(axis=0)]
    return empty


def _in_blocks(values: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """[rows, K] as [rows, blocks, block], the last one filled up with zeros."""
    missing = -values.shape[1] % block
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return values.reshape(len(values), -1, block)
