"""How frames of a video are to be seen, as the file tells: quarter turns and flips."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
Matrix: TypeAlias = tuple[int, int, int, int]
"""(a, b, c, d): a pixel (x, y), y downwards, is seen at (a x + c y, b x + d y)."""

_TAGGED: dict[float, Matrix] = {
    0: (1, 0, 0, 1),
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}
_NO_QUARTER: Matrix = (1, 1, -1, 1)
"""In place of any other angle: it is applied by nobody."""


def _degrees(tag: str) -> float:
    """Between 0 and 360; not a number where the tag holds none."""
    try:
        return float(tag) % 360
    except ValueError:
        return float("nan")


def tagged_matrix(tag: str) -> Matrix:
    """The matrix of a ``rotate`` tag of the stream: degrees, clockwise, as older files tell it."""
    return _TAGGED.get(_degrees(tag), _NO_QUARTER)


def display_matrix(frame: Any) -> Matrix | None:
    """How a frame is to be seen, as its container or codec tells.

    Source: FFmpeg ``libavutil/display.h``: nine 32-bit numbers in rows of three.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX" and len(bytes(data)) == 36:
            numbers = np.frombuffer(bytes(data), np.int32)
            return int(numbers[0]), int(numbers[1]), int(numbers[3]), int(numbers[4])
    return None


def transformed(pixels: Pixels, matrix: Matrix) -> Pixels | None:
    """Pixels after quarter turns and flips; None where the matrix asks for anything else."""
    straight, crossed = (matrix[0], matrix[3]), (matrix[1], matrix[2])
    is_crossed = min(map(abs, crossed)) > min(map(abs, straight))
    along, across = (crossed, straight) if is_crossed else (straight, crossed)
    if not any(matrix):
        return pixels
    if max(map(abs, across)) * _STRAIGHT > min(map(abs, along)):
        return None
    if is_crossed:
        down, right = along
        pixels = pixels.transpose(1, 0, 2)
    else:
        right, down = along
    return np.ascontiguousarray(pixels[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1])


_STRAIGHT = 1000
"""Times what lies across an axis goes into what lies along it, in a quarter turn."""
