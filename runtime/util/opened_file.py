"""OpenedFile: a file that was opened once, and of which everything is read by that descriptor.

A name may be given to another file at any time; a descriptor stays with the file that it was opened
on. What was hashed through it is therefore what is read, mapped and computed with.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.util.safe_open import open_descriptor, read_at, read_whole

DESCRIPTORS = Path("/proc/self/fd")
"""Where the kernel offers this process's descriptors as files."""

Fingerprint = tuple[int, ...]
"""size, mtime_ns, ctime_ns, inode, device of a file."""


def fingerprint(status: os.stat_result) -> Fingerprint:
    """What tells, without reading, that a file is still the one it was.

    ``ctime_ns`` is in it because programs may set mtime at will, but not ctime.
    """
    return (
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    )


class OpenedFile:
    """A regular file, open for reading. Close it, or use it as a context manager.

    Args:
        path: the file; a symbolic link to a file is followed, now and never again.
        name: what it is called in its folder; the path's last part if left out.

    Raises:
        ArtifactError: as ``open_descriptor``.

    Attributes:
        fingerprint: of the file when it was opened.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self.path = path
        self.name = name or path.name
        self._content: bytes | None = None
        self._descriptor = open_descriptor(path, follow_link=True)
        self.fingerprint = fingerprint(os.fstat(self._descriptor))

    @property
    def descriptor(self) -> int:
        """Of the file.

        Raises:
            ArtifactError: it is closed.
        """
        if self._descriptor < 0:
            raise ArtifactError(f"{self.path} is closed; load the artifact again")
        return self._descriptor

    @property
    def size(self) -> int:
        """Bytes that it had when it was opened."""
        return self.fingerprint[0]

    def current_fingerprint(self) -> Fingerprint:
        """Of the file as it is now."""
        return fingerprint(os.fstat(self.descriptor))

    def content(self, limit: int) -> bytes:
        """All of it, read once and kept: those who ask later get the same bytes.

        Raises:
            ArtifactError: it has more bytes than the limit, or cannot be read.
        """
        if self._content is None or len(self._content) > limit:
            self._content = self.read(limit)
        return self._content

    def read(self, limit: int) -> bytes:
        """All of it, at most ``limit`` bytes; raises as ``content``."""
        return read_whole(self.descriptor, limit, self.path)

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``; fewer only where the file ends."""
        return read_at(self.descriptor, offset, length, self.path)

    @contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        """The bytes without holding them in memory; they are pages of the file."""
        with mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ) as data:
            yield data

    def path_of_descriptor(self) -> Path | None:
        """A path to this very file, whatever its name stands for; None where the system has none.

        For libraries that open paths themselves. Valid until the file is closed.
        """
        path = DESCRIPTORS / str(self.descriptor)
        return path if path.exists() else None

    def close(self) -> None:
        """Give the descriptor back; idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        self._content = None
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()
