"""Bicubic resizing of video frames, bit-equal to what the reference's video processor computes.

That one resizes 8-bit tensors with torch (``interpolate``, bicubic, antialias), not with Pillow:
the same filter (Keys, a = -0.5), but weights rounded to as many binary digits as fit 16 bits for
the largest of them, where Pillow keeps 22. About one value in 36 differs. It is all integers, so a
few lines of numpy give the same bits on any machine.

Source: torch 2.13 ``aten/src/ATen/native/cpu/UpSampleKernel.cpp``
(``compute_index_ranges_int16_weights`` and its antialias filter); rows are resized first.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_FILTER_SIZE = 4
_A = -0.5
_MOST_DIGITS = 22
_LARGEST = 1 << 15

Pixels = NDArray[np.uint8]


def resize_middle(frame: Pixels, height: int, width: int, side: int) -> Pixels:
    """Resize a frame and cut a square out of its middle; only the square is computed.

    Args:
        frame: uint8 (height, width, 3).
        height: of the whole resized frame, at least ``side``.
        width: of the whole resized frame, at least ``side``.
        side: of the square.

    Returns:
        uint8 (side, side, 3).
    """
    top, left = (height - side) // 2, (width - side) // 2
    columns = slice(left, left + side)
    rows = slice(top, top + side)
    wide = _along_rows(frame, width, columns)
    # The same pass over rows, on the frame turned.
    tall = _along_rows(np.ascontiguousarray(wide.transpose(1, 0, 2)), height, rows)
    return np.ascontiguousarray(tall.transpose(1, 0, 2))


def _along_rows(pixels: Pixels, size: int, wanted: slice) -> Pixels:
    """Each row resized to ``size`` pixels, of which some are wanted: uint8 (rows, wanted, 3)."""
    if size == pixels.shape[1]:
        return pixels[:, wanted]
    first, weights, digits = _weights(pixels.shape[1], size)
    first, weights = first[wanted], weights[wanted]
    last = pixels.shape[1] - 1
    total = np.full((pixels.shape[0], len(first), pixels.shape[2]), 1 << (digits - 1), np.int32)
    for tap in range(weights.shape[1]):
        # Behind the last pixel weights are zero.
        total += pixels[:, np.minimum(first + tap, last)] * weights[:, tap, None]
    np.right_shift(total, digits, out=total)
    return total.clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=16)
def _weights(in_size: int, out_size: int) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """First pixel and weights (outputs, taps) behind each output, and the weights' digits."""
    scale = in_size / out_size
    support = _FILTER_SIZE / 2 * max(scale, 1.0)
    taps = int(np.ceil(support)) * 2 + 1
    inverse = 1.0 / scale if scale >= 1.0 else 1.0
    center = scale * (np.arange(out_size) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), in_size) - first
    count = np.clip(count, 0, taps)
    place = np.arange(taps)
    floats = _keys((place + first[:, None] - center[:, None] + 0.5) * inverse)
    floats[place >= count[:, None]] = 0.0
    # Added up one by one, as there: another order could round otherwise.
    total = np.zeros(out_size)
    for tap in range(taps):
        total += floats[:, tap]
    floats /= total[:, None]
    largest = float(floats.max())
    digits = 0
    while digits < _MOST_DIGITS and int(0.5 + largest * (1 << (digits + 1))) < _LARGEST:
        digits += 1
    scaled = floats * (1 << digits)
    return first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32), digits


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
