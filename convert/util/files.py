"""Disk: free space before writing, durable writes, and what to say when the disk is full."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from llava_edge.profiles.errors import RequestError
from llava_edge.profiles.sizes import format_bytes

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew beyond the size that is allowed here (see ulimit -f)",
}
_REFUSALS = {
    errno.EROFS: "the file system is read-only. Name a folder on another one",
    errno.EACCES: "this user may not write there. Change its permissions, or name another folder",
    errno.EPERM: "this user may not write there. Change its permissions, or name another folder",
    errno.EBUSY: "it is in use as a mount point or by another process. Name a folder inside it",
    errno.EXDEV: "it lies on another file system than its neighbours. Name a folder inside it",
    errno.ENAMETOOLONG: "the name is longer than the file system allows. Name a shorter one",
    errno.ENOTDIR: "a part of the path is a file, not a folder. Name another folder",
    errno.EEXIST: "a file is in the way of a folder. Remove it, or name another folder",
    errno.ELOOP: "its symbolic links lead in a circle. Name the folder itself",
    errno.EIO: "the disk does not work (input/output error). Check it, or use another one",
    errno.ESTALE: "the network file system has let go of the folder. Mount it again",
    errno.EMFILE: "too many files are open. Raise the limit (ulimit -n)",
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


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start what cannot end.

    Raises:
        RequestError: fewer than ``needed_bytes`` are free; says both numbers.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise RequestError(
            f"writing {folder} needs {format_bytes(needed_bytes)}; {format_bytes(free)} are free "
            f"there. Free {format_bytes(needed_bytes - free)} more or choose another folder."
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


def refusal(error: OSError) -> str:
    """What the system refused, of which file, and what to do; a part of a sentence."""
    said = _REFUSALS.get(error.errno or 0, error.strerror or str(error))
    named = error.filename2 or error.filename
    where = os.fsdecode(named) if isinstance(named, (str, bytes)) else ""
    return f"{where}: {said}" if where else said


def is_mount_point(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder is where something is mounted, such as a volume of a container.

    Args:
        folder: an existing one.
        mounts: the system's list; a folder mounted from the same file system is found there alone.
    """
    if os.path.ismount(folder):
        return True
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return False
    places = {line.split(" ")[4] for line in lines if line.count(" ") > 4}
    # Blanks and the like stand in the list as octal numbers.
    written = re.sub(r"[ \t\n\\]", lambda m: f"\\{ord(m[0]):03o}", str(folder.resolve()))
    return written in places
