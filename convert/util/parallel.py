"""Rows of a matrix in chunks, spread over threads; each chunk is computed by one thread alone.

Rows of a weight matrix are quantised independently of each other. One torch thread a chunk needs no
barriers inside an operation, and makes a chunk's bytes independent of how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from llava_edge.convert.util.torch_threads import torch_threads

T = TypeVar("T")

_ELEMENTS_AT_A_TIME = 1 << 23
_FEWEST_ROWS = 256
# Each worker holds a few float64 copies of its chunk: more of them take chunks as much smaller.
_MOST_WORKERS = 4
_MOST_SMALL = 16


def map_rows(shape: Sequence[int], work: Callable[[slice], T], *, small: bool = False) -> list[T]:
    """Call ``work`` with slices that cover all rows of a matrix [rows, columns]; results in order.

    While it runs, torch in this process uses one thread an operation.

    Args:
        shape: of the matrix.
        work: on some of its rows.
        small: it is as quick on few rows as on many, so that all cores may share a matrix.
    """
    num_rows, num_columns = shape
    most = _MOST_SMALL if small else _MOST_WORKERS
    step = max(_FEWEST_ROWS, _ELEMENTS_AT_A_TIME * _MOST_WORKERS // most // num_columns)
    chunks = [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
    workers = min(torch.get_num_threads(), len(chunks), most)
    with torch_threads(1):
        if workers == 1:
            return [work(rows) for rows in chunks]
        with ThreadPoolExecutor(workers, "rows") as pool:
            return list(pool.map(work, chunks))
