"""Opening a file that must be a regular one: no pipe, no device, no more than so many bytes.

A folder from elsewhere may hold a symbolic link to a private file, a named pipe that blocks the
reader for ever, or a link to a device that never ends. Everything of an artifact is opened through
here, and so is every file of a checkpoint, whose hub caches consist of links to files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError, LlavaEdgeError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def open_descriptor(
    path: Path, *, links: bool, kind: type[LlavaEdgeError], step: str
) -> Iterator[int]:
    """Yield a read-only descriptor of a regular file.

    Args:
        path: the file.
        links: whether a symbolic link to a regular file is followed.
        kind: error to raise.
        step: next step that ends its message.

    Raises:
        LlavaEdgeError: of the given kind; the file is missing, unreadable or not a regular file.
    """
    # O_NONBLOCK: opening a named pipe without it waits for a writer that never comes.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        # Opening alone makes some devices act, so the path is looked at before.
        _check_kind(os.stat(path, follow_symlinks=links).st_mode, path, kind, step)
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise kind(f"{path} cannot be opened: {_reason(path, error)}. {step}") from error
    try:
        _check_kind(os.fstat(descriptor).st_mode, path, kind, step)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yield a read-only descriptor of a regular file of an artifact.

    Raises:
        ArtifactError: the file is missing, unreadable, a symbolic link or not a regular file.
    """
    with open_descriptor(
        path, links=False, kind=ArtifactError, step="Copy the artifact again."
    ) as descriptor:
        yield descriptor


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


def read_at(
    descriptor: int,
    offset: int,
    length: int,
    path: Path,
    kind: type[LlavaEdgeError] = ArtifactError,
) -> bytes:
    """Up to ``length`` bytes from ``offset``; fewer only where the file ends.

    Raises:
        LlavaEdgeError: of the given kind; the file cannot be read.
    """
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
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    return b"".join(parts)


def _check_kind(mode: int, path: Path, kind: type[LlavaEdgeError], step: str) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        raise kind(f"{path} cannot be opened: it is a symbolic link. {step}")
    found = next((name for check, name in _KINDS if check(mode)), "something else")
    raise kind(f"{path} is {found}, not a regular file. {step}")


def _reason(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        if path.is_symlink():
            return f"it is a symbolic link ({error.strerror})"
        return str(error.strerror)
    return str(error)
