"""Gaps: how far two tensors are apart, as a share of what the reference ranges over."""

from __future__ import annotations

import numpy as np

from llava_edge.runtime.util.arrays import Array

GAP = "max_gap_of_range"
"""The metric's key in the table of bounds."""


def row_gaps(ours: Array, theirs: Array) -> Array:
    """Largest difference of each row over the row's range in the reference, float64 [rows].

    NaN where a row of ours is not finite.
    """
    difference = np.abs(ours.astype(np.float64) - theirs).max(-1)
    gaps: Array = difference / np.maximum(np.ptp(theirs, axis=-1), np.finfo(np.float32).tiny)
    return gaps


def whole_gap(ours: Array, theirs: Array) -> float:
    """Largest difference over the range of the whole reference tensor; 0 for empty ones."""
    if not theirs.size:
        return 0.0
    spread = max(float(np.ptp(theirs)), float(np.finfo(np.float32).tiny))
    return float(np.abs(ours.astype(np.float64) - theirs).max() / spread)


def statistics(tensor: Array) -> dict[str, float]:
    """Mean, deviation and extremes."""
    values = tensor.astype(np.float64)
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }
