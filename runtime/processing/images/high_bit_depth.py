"""High bit depth: pixels of more than 8 bits become 8-bit ones.

The reference clips such values at 255, so that nearly all of a 16-bit picture is white. Here they
are scaled unless ``Limits.high_bit_depth`` asks for that. The rule, by the finite values of the
whole picture:

- unsigned 16-bit values: v / 257, rounded;
- booleans: 255 for true;
- floats from 0 to 1: 255 v, rounded;
- other values from 0 to 255: as they are, fractions dropped as the reference does;
- other values from 0 to 65,535: as unsigned 16-bit ones;
- all others: from the smallest to the largest, (v - min) / (max - min).

NaN becomes 0; infinite values become the end of the range on their side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llava_edge.runtime.util.arrays import Array

Rows = Array


@dataclass(frozen=True)
class Scaling:
    """How values become 8 bits: 255 (v - low) / (high - low), rounded half up.

    Attributes:
        low: becomes 0.
        high: becomes 255.
        note: what was done, for people.
        is_stretched: the ends are the picture's own values, not those of a type.
    """

    low: float
    high: float
    note: str
    is_stretched: bool = False

    def apply(self, rows: Rows) -> NDArray[np.uint8]:
        """8-bit values of some rows, of the same shape."""
        if rows.dtype.kind == "u" and rows.dtype.itemsize == 2 and self.high == 65535:
            # v / 257 rounded, in integers.
            return ((rows.astype(np.uint32) + 128) // 257).astype(np.uint8)
        span = (self.high - self.low) or 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (rows.astype(np.float64) - self.low) * (255 / span)
            scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
            return np.floor(np.clip(scaled, 0, 255) + 0.5).astype(np.uint8)


def choose_scaling(dtype: np.dtype[Any], rows: Callable[[], Iterable[Rows]]) -> Scaling | None:
    """The rule for a picture.

    Args:
        dtype: of its values.
        rows: gives all of it, some rows at a time.

    Returns:
        None where 8 bits hold the values as they are.
    """
    if dtype == np.uint8:
        return None
    if dtype.kind == "b":
        return Scaling(0, 1, "true and false became 255 and 0")
    if dtype.kind == "u" and dtype.itemsize == 2:
        return Scaling(0, 65535, "16-bit values were scaled to 8 bits")
    low, high = np.inf, -np.inf
    for part in rows():
        finite = part[np.isfinite(part)] if dtype.kind == "f" else part
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        return Scaling(0, 1, "no value is finite; all became black or white")
    if low >= 0 and high <= 1 and dtype.kind == "f":
        return Scaling(0, 1, "values from 0 to 1 were scaled to 8 bits")
    if low >= 0 and high <= 255:
        return None
    if low >= 0 and high <= 65535:
        return Scaling(0, 65535, "values up to 65535 were scaled to 8 bits")
    return Scaling(low, high, f"values from {low:.6g} to {high:.6g} were scaled to 8 bits", True)
