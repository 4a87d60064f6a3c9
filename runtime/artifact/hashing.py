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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llava_edge.profiles.errors import ArtifactError
from llava_edge.runtime.util.cache_dir import cache_folder, keep_in_cache
from llava_edge.runtime.util.checksummed_json import parse_strict
from llava_edge.runtime.util.opened_file import Fingerprint, OpenedFile
from llava_edge.runtime.util.safe_open import read_bounded

_CHUNK = 1 << 20
_CACHE_LIMIT = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")

_Item = TypeVar("_Item")


def hash_files(paths: Iterable[Path], *, threads: int = 2) -> dict[Path, str]:
    """SHA-256 of each regular file, as 64 hexadecimal digits; links to files are followed.

    Raises:
        ArtifactError: a file cannot be opened or read, or changes while it is read.
    """

    def hash_path(path: Path, stop: threading.Event) -> str:
        with OpenedFile(path) as opened:
            return _hash(opened, stop)

    return _on_threads(hash_path, paths, _size, threads)


def hash_file(path: Path) -> str:
    """SHA-256 of one regular file; raises as ``hash_files``."""
    with OpenedFile(path) as opened:
        return _hash(opened, threading.Event())


def hash_opened(files: Iterable[OpenedFile], *, threads: int = 2) -> dict[str, str]:
    """SHA-256 by name of files that are open; raises as ``hash_files``."""
    digests = _on_threads(_hash, files, lambda opened: opened.size, threads)
    return {opened.name: digest for opened, digest in digests.items()}


def _on_threads(
    hash_one: Callable[[_Item, threading.Event], str],
    items: Iterable[_Item],
    size: Callable[[_Item], int],
    threads: int,
) -> dict[_Item, str]:
    # The largest first: a big file that starts last would run alone at the end.
    ordered = sorted(items, key=size, reverse=True)
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        try:
            digests = pool.map(lambda item: hash_one(item, stop), ordered)
            return dict(zip(ordered, digests, strict=True))
        except BaseException:
            stop.set()
            raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0


def _hash(opened: OpenedFile, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    offset = 0
    descriptor = opened.descriptor
    before = opened.current_fingerprint()
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
        raise ArtifactError(f"{opened.path} cannot be read: {error.strerror}") from error
    if opened.current_fingerprint()[:2] != before[:2]:
        raise ArtifactError(
            f"{opened.path} changed while it was read; try again when it is complete"
        )
    return digest.hexdigest()


class DigestCache:
    """Digests of one folder's files, kept in the user's cache folder between runs.

    An entry counts only while the file's size, times, inode and device are those it was hashed
    with. Absence or damage of the cache costs one more hashing, nothing else. Anyone who can write
    the cache can already write the user's other files, so it is trusted as far as the user is.

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

    def hash_files(self, files: Iterable[OpenedFile], *, threads: int = 2) -> dict[str, str]:
        """SHA-256 by name; only what changed since it was last hashed is read.

        Raises:
            ArtifactError: as the function ``hash_files``.
        """
        known = self._load()
        found: dict[str, str] = {}
        stale: list[OpenedFile] = []
        for opened in files:
            entry = known.get(opened.name)
            if entry is not None and entry[0] == opened.current_fingerprint():
                found[opened.name] = entry[1]
            else:
                stale.append(opened)
        if not stale:
            return found
        before = {opened: opened.current_fingerprint() for opened in stale}
        fresh = hash_opened(stale, threads=threads)
        found.update(fresh)
        latest = time.time_ns() - self._settle_ns
        settled = {
            opened.name: (prints, fresh[opened.name])
            for opened, prints in before.items()
            if max(prints[1], prints[2]) <= latest and opened.current_fingerprint() == prints
        }
        self._store({**known, **settled})
        return found

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
