"""The files of a checkpoint by their contents: digests, and whether they are still the same.

They are not listed by name: whatever can hold settings, a tokenizer or a template counts, since
several libraries read the folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from llava_edge.convert.util.text_files import size_limit
from llava_edge.profiles.errors import CheckpointError, shorten
from llava_edge.runtime.artifact.manifest import FileEntry
from llava_edge.runtime.util.progress import Progress

Stamp = tuple[int, int, int, int]
"""Size, mtime_ns, inode, device of a file."""

SETTINGS = "checkpoint_files"
"""Where ``manifest.conversion`` keeps ``setting_digests``."""

WEIGHT_DIGESTS = "weights_sha256"
"""Where ``manifest.conversion`` keeps what ``DigestedSource`` noted."""

_SETTINGS = (".json", ".jinja", ".model", "merges.txt", "vocab.txt")
"""Ends of names of files that transformers, tokenizers and this project read settings from.

Other texts are notes and logs, which may grow beside a checkpoint while it is used.
"""
_TEMPLATES = "additional_chat_templates"
_WEIGHTS = ".safetensors"
_BLOCK_BYTES = 1 << 22


class CheckpointFiles:
    """The files of a checkpoint folder as they are now; make it before any of them is read.

    Args:
        folder: of the checkpoint. Links are followed, as in a hub cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamps = _stamps(folder)

    def digests(
        self, weight_files: Sequence[Path], progress: Progress | None = None
    ) -> dict[str, FileEntry]:
        """Bytes and SHA-256 of every file with settings and of the weights, by name.

        Args:
            weight_files: the model's; other files with weights are not read by anything.
            progress: told about bytes.

        Raises:
            CheckpointError: a file cannot be read, or changed since this object was made.
        """
        chosen = [
            self._folder / name for name in sorted(self._stamps) if not name.endswith(_WEIGHTS)
        ]
        found = hash_checkpoint_files([*chosen, *weight_files], progress)
        self.check()
        return {path.relative_to(self._folder).as_posix(): entry for path, entry in found.items()}

    def check(self) -> None:
        """Make sure that all files are still the ones they were.

        Raises:
            CheckpointError: a file was changed, added or removed.
        """
        changed = changed_names(self._stamps, _stamps(self._folder))
        if changed:
            raise CheckpointError(
                f"{self._folder} changed while it was in use: {shorten(changed)}. Nothing that "
                "was made from a mixture is kept. Run the same command again once the folder is "
                "complete."
            )


def setting_digests(found: Mapping[str, FileEntry]) -> dict[str, str]:
    """SHA-256 of those of ``CheckpointFiles.digests`` that are no weights, by name."""
    return {name: entry.sha256 for name, entry in found.items() if not name.endswith(_WEIGHTS)}


def changed_names(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Names of inputs that differ, are new, or are gone; sorted."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def hash_checkpoint_files(
    files: Iterable[Path], progress: Progress | None = None
) -> dict[Path, FileEntry]:
    """Bytes and SHA-256 of each file.

    Raises:
        CheckpointError: a file can no longer be read.
    """
    ordered = list(dict.fromkeys(files))
    found: dict[Path, FileEntry] = {}
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("digest", done, total)

    file = Path()
    try:
        total = sum(file.stat().st_size for file in ordered)
        for file in ordered:
            found[file] = hash_contents(file, count)
    except OSError as error:
        raise CheckpointError(
            f"{file.parent} changed while it was read: {file.name}: {error.strerror or error}"
        ) from error
    return found


def hash_contents(path: Path, report: Callable[[int], None] | None = None) -> FileEntry:
    """Bytes and SHA-256 of one file; ``report`` is told the bytes of each block.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            if report is not None:
                report(len(block))
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def file_stamp(path: Path) -> Stamp | None:
    """What tells without reading that a file is the same; None where no regular file is there.

    Not ``ctime``: a backup that links or a change of permissions must not end hours of work.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _stamps(folder: Path) -> dict[str, Stamp]:
    """Those of every file that may be read, by name.

    A file with settings that is larger than any may be is read by nothing, such as training data.
    """
    found: dict[str, Stamp] = {}
    for place in (folder, folder / _TEMPLATES):
        try:
            names = os.listdir(place)
        except OSError:
            continue
        for name in names:
            stamp = file_stamp(place / name) if name.endswith((*_SETTINGS, _WEIGHTS)) else None
            if stamp is not None and (name.endswith(_WEIGHTS) or stamp[0] <= size_limit(name)):
                found[(place / name).relative_to(folder).as_posix()] = stamp
    return found
