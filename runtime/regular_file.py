"""Opening a file that must be a plain one: no pipe, no device, no more than so many bytes.

A folder from elsewhere may hold a symbolic link to a private file or a named pipe that blocks the
reader for ever. Everything of an artifact is opened through here. Links are followed only where the
caller says so: what they lead to must be a plain file all the same.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError


def open_descriptor(path: Path, *, follow_link: bool = False) -> int:
    """A read-only descriptor of a regular file; the caller closes it.

    Args:
        path: the file.
        follow_link: open the file that a symbolic link leads to.

    Raises:
        ArtifactError: the file is missing, unreadable or not a regular file, a link leads nowhere,
            in a circle or to a folder, or it is a link and links are not followed.
    """
    # O_NONBLOCK: opening a named pipe without it waits for a writer that never comes.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if follow_link:
            # Looked at first: opening some devices does something already.
            _require_regular(path, path.stat())
        else:
            flags |= os.O_NOFOLLOW
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = _reason(path, error, follow_link)
        raise ArtifactError(
            f"{path} cannot be opened: {reason}. Copy the artifact again."
        ) from error
    try:
        _require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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


def link_fault(path: Path, error: OSError) -> str:
    """Why a symbolic link cannot be followed, as the end of a sentence."""
    if error.errno == errno.ELOOP:
        return "it is a link that leads in a circle"
    if error.errno == errno.ENOENT:
        return f"it is a link to {_target(path)}, where there is nothing"
    return f"it is a link to {_target(path)}: {error.strerror}"


def _target(path: Path) -> str:
    try:
        return ascii(os.readlink(path))[1:-1][:200]
    except OSError:
        return "another place"


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    link = path.is_symlink()
    kind = (
        "is a link to a folder"
        if link and stat.S_ISDIR(status.st_mode)
        else ("is a link to what is not a regular file" if link else "is not a regular file")
    )
    raise ArtifactError(f"{path} {kind}. Copy the artifact again.")


def _reason(path: Path, error: OSError | ValueError, follow_link: bool) -> str:
    if not isinstance(error, OSError):
        return str(error)
    if not path.is_symlink():
        return str(error.strerror)
    # With O_NOFOLLOW a link answers "too many levels of symbolic links", which misleads.
    return link_fault(path, error) if follow_link else "it is a symbolic link"
