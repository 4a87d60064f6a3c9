"""The folder of unfinished work beside an output: names in it, and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from llava_edge.profiles.errors import RequestError, shorten

LOCK, JOURNAL, ARTIFACT, REPLACED = ".lock", "journal.json", "artifact", "replaced"
WORK, PUBLISHING = "work", "publishing.json"


def lock_partial(partial: Path) -> int:
    """Take the lock of a partial folder, creating both; return its descriptor."""
    for _ in range(100):
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        _refuse_foreign(partial)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(partial / LOCK, flags, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have finished and removed the folder meanwhile; a lock on a file
            # that is no longer there protects nothing.
            there = (partial / LOCK).lstat()
            here = os.fstat(descriptor)
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(descriptor)
            raise RequestError(
                f"another conversion is writing {partial}. Wait for it, or name another output."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise RequestError(f"{partial} is created and removed all the time; name another output.")


def _refuse_foreign(partial: Path) -> None:
    try:
        if partial.is_symlink() or not partial.is_dir():
            raise RequestError(
                f"{partial} is no folder; it is needed for unfinished work. Move it."
            )
        ours = {LOCK, JOURNAL, ARTIFACT, WORK, REPLACED, PUBLISHING}
        foreign = [
            entry.name
            for entry in partial.iterdir()
            if entry.name not in ours
            and not entry.name.startswith((f".{JOURNAL}.", f".{PUBLISHING}."))
        ]
    except FileNotFoundError:
        return
    if foreign:
        raise RequestError(
            f"{partial} holds files that this tool did not write ({shorten(sorted(foreign))}). "
            "Move them, or name another output."
        )


def remove(path: Path) -> None:
    """Remove a file, link or folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
