"""Opening a file that must be a plain one: no link, no pipe, no device, no more than so many bytes.

A folder from elsewhere may hold a symbolic link to a private file or a named pipe that blocks the
reader for ever. Everything of an artifact is opened through here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yield a read-only descriptor of a regular file.

    Raises:
        ArtifactError: the file is missing, unreadable, a symbolic link or not a regular file.
    """
    # O_NONBLOCK: opening a named pipe without it waits for a writer that never comes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be opened: {_reason(path, error)}. Copy the artifact again."
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ArtifactError(f"{path} is not a regular file. Copy the artifact again.")
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
    parts: list[bytes] = []
    try:
        while length > 0:
            part = os.pread(descriptor, min(length, 1 << 24), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    return b"".join(parts)


def _reason(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        # With O_NOFOLLOW a link answers "too many levels of symbolic links", which misleads.
        return "it is a symbolic link" if path.is_symlink() else str(error.strerror)
    return str(error)
