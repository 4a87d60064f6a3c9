"""Files of an artifact: no link, no pipe, no device, no more than so many bytes.

A folder from elsewhere may hold a symbolic link to a private file or a named pipe that blocks the
reader for ever. Everything of an artifact is opened through here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import safe_open
from llava_edge.runtime.safe_open import open_descriptor

_STEP = "Copy the artifact again."


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yield a read-only descriptor of a regular file.

    Raises:
        ArtifactError: the file is missing, unreadable, a symbolic link or not a regular file.
    """
    descriptor = open_descriptor(path, follow_link=False, kind=ArtifactError, step=_STEP)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int) -> bytes:
    """Whole contents of a regular file of at most ``limit`` bytes.

    Raises:
        ArtifactError: as ``open_regular``, or the file is larger than the limit.
    """
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise ArtifactError(
                f"{path} has {size} bytes; at most {limit} are read. "
                "It is not what this tool writes: copy or convert the artifact again."
            )
        return read_at(descriptor, 0, limit + 1, path)[:limit]


def read_at(descriptor: int, offset: int, length: int, path: Path) -> bytes:
    """Up to ``length`` bytes from ``offset``; fewer only where the file ends."""
    return safe_open.read_at(descriptor, offset, length, path, ArtifactError)
