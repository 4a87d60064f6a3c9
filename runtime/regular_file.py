"""Files of an artifact: regular ones, read with a bound. Links are followed only where asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime import safe_open

_STEP = "Copy the artifact again."


def open_descriptor(path: Path, *, follow_link: bool = False) -> int:
    """A read-only descriptor of a regular file; the caller closes it.

    Raises:
        ArtifactError: as ``safe_open.open_descriptor``.
    """
    return safe_open.open_descriptor(path, follow_link=follow_link, kind=ArtifactError, step=_STEP)


@contextmanager
def open_regular(path: Path, *, follow_link: bool = False) -> Iterator[int]:
    """Yield a descriptor as ``open_descriptor`` returns it, and close it."""
    descriptor = open_descriptor(path, follow_link=follow_link)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int, *, follow_link: bool = False) -> bytes:
    """Whole contents of a regular file of at most ``limit`` bytes.

    Raises:
        ArtifactError: as ``open_descriptor``, or the file is larger than the limit.
    """
    with open_regular(path, follow_link=follow_link) as descriptor:
        return read_whole(descriptor, limit, path)


def read_whole(descriptor: int, limit: int, path: Path) -> bytes:
    """As ``read_bounded``, of a file that is open."""
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
