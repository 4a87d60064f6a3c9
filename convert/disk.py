"""Disk: free space before writing, durable writes, and what to say when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from llava_edge.profiles.errors import RequestError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew beyond the size that is allowed here (see ulimit -f)",
}
_SHORT = re.compile(r"\d+ requested and \d+ written")
# Writers in other languages hand on the system's answer as text only.
_FOREIGN = re.compile(rf"os error ({'|'.join(str(code) for code in _FULL)})\b")


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write where ``folder`` is or would be created."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    status = os.statvfs(there)
    return status.f_bavail * status.f_frsize


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start what cannot end.

    Raises:
        RequestError: fewer than ``needed_bytes`` are free; says both numbers.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise RequestError(
            f"writing {folder} needs {show_bytes(needed_bytes)}; {show_bytes(free)} are free "
            f"there. Free {show_bytes(needed_bytes - free)} more or choose another folder."
        )


def full_disk_reason(error: BaseException) -> str | None:
    """What ran out, where an error or one of its causes says that writing found no room."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _FULL:
            return _FULL[current.errno]
        # numpy says how much of an array it could write, and not why it was not all.
        if isinstance(current, OSError) and current.errno is None and _SHORT.search(str(current)):
            return _FULL[errno.ENOSPC]
        match = None if isinstance(current, OSError) else _FOREIGN.search(str(current))
        if match:
            return _FULL[int(match[1])]
        current = current.__cause__ or current.__context__
    return None


def show_bytes(count: int) -> str:
    """A size for people, with the exact number: ``1.50 GiB (1610612736 bytes)``."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.2f} {unit} ({count} bytes)"


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is in memory already: there whole, durably, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(partial, "wb", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)
