"""Files of parts in the making: what appeared, what is intact, what no part lists."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from llava_edge.profiles.errors import ArtifactError, ExportError, shorten
from llava_edge.runtime.artifact.hashing import hash_files
from llava_edge.runtime.artifact.manifest import FileEntry
from llava_edge.runtime.artifact.manifest_validation import UNLISTED, is_safe_name
from llava_edge.runtime.util.atomic_write import sync

Stamp = tuple[int, int, int]
"""size, mtime_ns and inode of a file in the making."""


def file_stamps(folder: Path) -> dict[str, Stamp]:
    """All files below ``folder``; links and the like too, so that they are noticed."""
    stamps: dict[str, Stamp] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            status = path.lstat()
            key = path.relative_to(folder).as_posix()
            stamps[key] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return stamps


def is_intact(folder: Path, files: Mapping[str, FileEntry]) -> bool:
    """Whether the files of a part still have their sizes and digests."""
    paths = {name: folder / name for name in files}
    try:
        if any(path.lstat().st_size != files[name].bytes for name, path in paths.items()):
            return False
        digests = hash_files(paths.values())
    except (OSError, ArtifactError):
        return False
    return all(digests[path] == files[name].sha256 for name, path in paths.items())


def seal_new_files(folder: Path, before: Mapping[str, Stamp]) -> dict[str, FileEntry]:
    """Flush the files that appeared since ``before`` and take their digests.

    Raises:
        ExportError: files of another part changed, or an artifact cannot hold what appeared.
    """
    after = file_stamps(folder)
    touched = sorted(name for name in before if after.get(name) != before[name])
    if touched:
        raise ExportError(f"the part changed files of another part: {shorten(touched)}")
    fresh = sorted(set(after) - set(before))
    unfit = [
        name
        for name in fresh
        if name in UNLISTED
        or not is_safe_name(name)
        or not stat.S_ISREG((folder / name).lstat().st_mode)
    ]
    if unfit:
        raise ExportError(f"an artifact cannot hold these files: {shorten(unfit)}")
    paths = [folder / name for name in fresh]
    for path in paths:
        sync(path)
    for place in sorted({path.parent for path in paths}):
        sync(place)
    digests = hash_files(paths)
    return {
        name: FileEntry(bytes=after[name][0], sha256=digests[path])
        for name, path in zip(fresh, paths, strict=True)
    }


def remove_unlisted(folder: Path, listed: Collection[str]) -> None:
    """Remove what no finished part lists, and folders that are empty then."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            if path.relative_to(folder).as_posix() not in listed:
                path.unlink()
        for link in Path(place).iterdir():
            if link.is_symlink():
                link.unlink()
        if Path(place) != folder and not any(Path(place).iterdir()):
            Path(place).rmdir()
