"""SHA-256 of large files with a few threads, and a cache of digests that were computed before.

``hashlib`` and ``pread`` release the interpreter lock, so threads run side by side. A buffer of
1 MiB stays in the processor's cache between reading and hashing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.cache_folder import cache_folder, keep_in_cache
from llava_edge.runtime.regular_file import open_regular, read_bounded
from llava_edge.runtime.sealed_json import parse_strict

_CHUNK = 1 << 20
_CACHE_LIMIT = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")

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


def hash_files(paths: Iterable[Path], *, threads: int = 2) -> dict[Path, str]:
    """SHA-256 of each regular file, as 64 hexadecimal digits.

    Raises:
        ArtifactError: a file cannot be opened or read, or changes while it is read.
    """
    # The largest first: a big file that starts last would run alone at the end.
    ordered = sorted(paths, key=_size, reverse=True)
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        try:
            return dict(zip(ordered, pool.map(lambda p: _hash(p, stop), ordered), strict=True))
        except BaseException:
            stop.set()
            raise


def hash_file(path: Path) -> str:
    """SHA-256 of one regular file; raises as ``hash_files``."""
    return _hash(path, threading.Event())


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _hash(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    offset = 0
    with open_regular(path) as descriptor:
        before = fingerprint(os.fstat(descriptor))
        try:
            # No further than the size at the start: a file that grows as fast as it is read would
            # never end.
            while offset < before[0] and not stop.is_set():
                count = os.preadv(descriptor, [buffer], offset)
                if count == 0:
                    break
                digest.update(view[:count])
                offset += count
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
        if fingerprint(os.fstat(descriptor))[:2] != before[:2]:
            raise ArtifactError(f"{path} changed while it was read; try again when it is complete")
    return digest.hexdigest()


class DigestCache:
    """Digests of one folder's files, kept in the user's cache folder between runs.

    An entry counts only while the file's size, times, inode and device are those it was hashed
    with. Absence or damage of the cache costs one more hashing, nothing else. Whoever can write the
    cache can already write the user's other files, so it is trusted as far as the user is.

    Args:
        folder: the resolved folder whose files are hashed.
        settle_seconds: files touched more recently than this are not remembered: a second change
            within one tick of the file system's clock would go unseen.
    """

    def __init__(self, folder: Path, *, settle_seconds: float = 2.0) -> None:
        self._folder = folder
        self._settle_ns = int(settle_seconds * 1e9)
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        self._file = cache_folder() / "digests" / f"{name}.json"

    def hash_files(self, names: Iterable[str], *, threads: int = 2) -> dict[str, str]:
        """SHA-256 by name relative to the folder; only what changed is read.

        Raises:
            ArtifactError: as the function ``hash_files``.
        """
        known = self._load()
        found: dict[str, str] = {}
        stale: dict[str, Fingerprint] = {}
        for name in names:
            print_now = self._fingerprint(name)
            entry = known.get(name)
            if entry is not None and entry[0] == print_now:
                found[name] = entry[1]
            else:
                stale[name] = print_now
        if not stale:
            return found
        fresh = hash_files([self._folder / name for name in stale], threads=threads)
        found.update({name: fresh[self._folder / name] for name in stale})
        self._store({**known, **self._settled(stale, found)})
        return found

    def _settled(
        self, stale: Mapping[str, Fingerprint], found: Mapping[str, str]
    ) -> dict[str, tuple[Fingerprint, str]]:
        latest = time.time_ns() - self._settle_ns
        return {
            name: (before, found[name])
            for name, before in stale.items()
            if max(before[1], before[2]) <= latest and self._fingerprint(name) == before
        }

    def _fingerprint(self, name: str) -> Fingerprint:
        try:
            return fingerprint((self._folder / name).lstat())
        except OSError as error:
            raise ArtifactError(
                f"{self._folder / name} cannot be read: {error.strerror}. "
                "Copy or convert the artifact again."
            ) from error

    def _load(self) -> dict[str, tuple[Fingerprint, str]]:
        try:
            document = parse_strict(read_bounded(self._file, _CACHE_LIMIT), str(self._file))
        except ArtifactError:
            return {}
        known: dict[str, tuple[Fingerprint, str]] = {}
        for name, entry in document.items() if isinstance(document, dict) else ():
            match entry:
                case [[*numbers], str(digest)] if all(
                    type(number) is int for number in numbers
                ) and _DIGEST.fullmatch(digest):
                    known[name] = (tuple(numbers), digest)
        return known

    def _store(self, known: Mapping[str, tuple[Fingerprint, str]]) -> None:
        text = json.dumps({name: [list(prints), d] for name, (prints, d) in known.items()})
        keep_in_cache(self._file, text)
