"""Opening a file that must be a regular one: no pipe, no device, no folder.

A folder from elsewhere may hold a symbolic link to a private file, a named pipe that blocks the
reader for ever, or a link to a device that never ends. Every file from elsewhere is opened through
here; links are followed only where the caller says so, and what they lead to must be a regular file
all the same.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError, LlavaEdgeError, printable
from llava_edge.profiles.sizes import format_above, format_bytes

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_CHUNK_BYTES = 1 << 24
_STEP = "Copy the artifact again."


class NotRegularError(ValueError):
    """A path stands for a pipe, device, folder or link; the message says which, as a predicate."""


def open_plain(path: str | os.PathLike[str], *, follow_link: bool = True) -> int:
    """A read-only descriptor of a regular file; the caller closes it.

    Raises:
        NotRegularError: it is something else; nothing of it was opened.
        OSError: it cannot be opened.
        ValueError: the path is none.
    """
    # Opening alone makes some devices act, so the path is looked at before.
    _require_regular(path, os.stat(path, follow_symlinks=follow_link).st_mode)
    # O_NONBLOCK: opening a named pipe without it waits for a writer that never comes.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_link else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_descriptor(
    path: Path,
    *,
    follow_link: bool = False,
    kind: type[LlavaEdgeError] = ArtifactError,
    step: str = _STEP,
) -> int:
    """``open_plain``, with its errors as one of ours.

    Args:
        path: the file.
        follow_link: open the file that a symbolic link leads to.
        kind: error to raise; an artifact's file if left out.
        step: next step that ends its message.

    Raises:
        LlavaEdgeError: of the given kind; the file is missing, unreadable or not a regular file, a
            link leads nowhere or in a circle, or it is a link and links are not followed.
    """
    try:
        return open_plain(path, follow_link=follow_link)
    except NotRegularError as error:
        raise kind(f"{printable(str(path))} {error}. {step}") from error
    except (OSError, ValueError) as error:
        reason = _reason(path, error)
        if isinstance(error, PermissionError):
            step = "Check its permissions."
        raise kind(f"{printable(str(path))} cannot be opened: {reason}. {step}") from error


@contextmanager
def open_regular(
    path: Path,
    *,
    follow_link: bool = False,
    kind: type[LlavaEdgeError] = ArtifactError,
    step: str = _STEP,
) -> Iterator[int]:
    """Yield a descriptor as ``open_descriptor`` returns it, and close it."""
    descriptor = open_descriptor(path, follow_link=follow_link, kind=kind, step=step)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(path: Path, limit: int, *, follow_link: bool = False) -> bytes:
    """Whole contents of an artifact's file of at most ``limit`` bytes.

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
            f"{path} has {format_above(size, limit)}; at most {format_bytes(limit)} are read. "
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
            part = os.pread(descriptor, min(length, _CHUNK_BYTES), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
    except OSError as error:
        raise kind(f"{printable(str(path))} cannot be read: {error.strerror}") from error
    return b"".join(parts)


def _require_regular(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        raise NotRegularError("cannot be opened: it is a symbolic link")
    found = next((name for check, name in _KINDS if check(mode)), "something else")
    link = "a link to " if os.path.islink(path) else ""
    raise NotRegularError(f"is {link}{found}, not a regular file")


def link_fault(path: Path, error: OSError) -> str:
    """Why a symbolic link cannot be followed, as the end of a sentence."""
    if error.errno == errno.ELOOP:
        return "it is a link that leads in a circle"
    if error.errno == errno.ENOENT:
        return f"it is a link to {_target(path)}, where there is nothing"
    return f"it is a link to {_target(path)}: {error.strerror}"


def _reason(path: Path, error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return link_fault(path, error) if path.is_symlink() else str(error.strerror)


def _target(path: Path) -> str:
    try:
        return printable(os.readlink(path))
    except OSError:
        return "another place"
