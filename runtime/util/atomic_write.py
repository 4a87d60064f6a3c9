"""Files and folders that appear whole or not at all; leftovers of dead processes are removed.

Contents are written beside their place under a name of their own and renamed at the end. A killed
process leaves that name behind. The next write into the same folder removes it, never that of a
process which still runs: each holds a lock on what it writes (``flock``), which the kernel releases
when it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - no POSIX: leftovers stay
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.llava-edge-[0-9a-f]{16}\.partial")
_TRIES = 100


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is in memory already: there whole, durably, or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written; what was there stays.
    """
    with atomic_file(path, durable=True) as partial:
        partial.write_bytes(data)


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """An empty file to write into, which replaces ``path`` where nothing fails.

    Args:
        path: in a folder that exists.
        durable: whether contents and name are on the disk when this ends.

    Raises:
        OSError: the folder cannot be written.
    """
    with _scratch(path.parent, is_folder=False) as partial:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    if durable:
        sync(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``folder`` where nothing fails.

    Args:
        folder: absent or empty, in a folder that exists.

    Raises:
        OSError: the folder cannot be written, or ``folder`` holds something by now.
    """
    with _scratch(folder.parent, is_folder=True) as partial:
        yield partial
        os.replace(partial, folder)


@contextmanager
def _scratch(parent: Path, *, is_folder: bool) -> Iterator[Path]:
    _remove_leftovers(parent)
    partial, lock = _locked(parent, is_folder)
    try:
        yield partial
    finally:
        # Nothing is left where it was renamed.
        with contextlib.suppress(OSError):
            _remove(partial)
        os.close(lock)


def _locked(parent: Path, is_folder: bool) -> tuple[Path, int]:
    """A new file or folder, and the descriptor whose lock says that somebody works on it."""
    for _ in range(_TRIES):
        partial = parent / f".llava-edge-{secrets.token_hex(8)}.partial"
        if is_folder:
            partial.mkdir()
            lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(partial, flags, 0o666)
        if fcntl is None:
            return partial, lock
        # A filesystem without locks: others cannot lock it either, so they leave it alone.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have taken it for a leftover before it was locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.lstat(partial)):
                return partial, lock
        os.close(lock)
    raise OSError(f"{parent} loses what is written there")


def _remove_leftovers(parent: Path) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_if_dead(Path(entry.path))


def _remove_if_dead(partial: Path) -> None:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags)
    try:
        # Only what this user wrote: the folder may be one that all may write to.
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(partial)
    finally:
        os.close(descriptor)


def _remove(partial: Path) -> None:
    if stat.S_ISDIR(os.lstat(partial).st_mode):
        shutil.rmtree(partial)
    else:
        partial.unlink()
