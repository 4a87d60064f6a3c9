"""Allocation: memory for arrays, asked of the system before it is taken.

A system that overcommits does not refuse memory, it kills the process that touches too much of it.
So the free memory is read first, and what it does not hold is an ``OutOfMemoryError`` that the
caller can answer by asking for less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import DTypeLike

from llava_edge.profiles.errors import OutOfMemoryError
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.host_memory import available_host_bytes

RESERVE_BYTES = 16 << 20
"""Left to everybody else; also what may go between the question and the taking."""

_ASKED_FROM = 1 << 20


def require_free(nbytes: int, what: str) -> None:
    """Refuse what the free host memory does not hold; a MiB is not worth the question.

    Args:
        nbytes: to be taken.
        what: takes them; for the message.

    Raises:
        OutOfMemoryError: says how much was asked and how much there is.
    """
    if nbytes < _ASKED_FROM:
        return
    free = available_host_bytes()
    if free is not None and nbytes > free - RESERVE_BYTES:
        raise OutOfMemoryError(
            f"{what} takes {nbytes / 2**20:.0f} MiB; {max(0, free - RESERVE_BYTES) / 2**20:.0f} "
            "MiB are free. Give fewer or smaller pictures, lower the grid, load with a smaller "
            "context, or close other programs."
        )


def allocate(shape: Sequence[int], dtype: DTypeLike, what: str) -> Array:
    """An array whose content is not set.

    Args:
        shape: of the array.
        dtype: of its elements.
        what: it holds; for the message.

    Raises:
        OutOfMemoryError: memory is not there.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    require_free(size, what)
    with translate_oom(f"for {what}, {size / 2**20:.0f} MiB"):
        return np.empty(tuple(shape), dtype)


@contextmanager
def translate_oom(where: str) -> Iterator[None]:
    """Python's own ``MemoryError``, whatever raises it, as ours.

    Args:
        where: memory ran out; for the message.
    """
    try:
        yield
    except MemoryError as error:
        raise OutOfMemoryError(f"memory ran out {where}") from error
