"""Control groups of this process: the folders in which the kernel keeps their limits.

Both versions and mounts of both side by side. Each limit holds for a group and for all groups
below it, so every ancestor counts.

Source: Linux ``Documentation/admin-guide/cgroup-v2.rst``, ``cgroup-v1/``, cgroups(7) and proc(5).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

UNIFIED = ""
"""In place of a controller's name: the one tree of version 2."""

_MOUNTED = PurePosixPath("/sys/fs/cgroup")
_USUAL_V2 = ("", "unified")
# Distributions mount these two together, and some without links of their own names.
_USUAL_V1 = {"cpu": ("cpu", "cpu,cpuacct", "cpuacct,cpu")}


def group_folders(controller: str, cgroup: Path, proc: Path) -> Iterator[Path]:
    """Folders of the process's own group and of the groups that hold it, as far as they are seen.

    Not all of them need to exist. In a container without a namespace of its own the group's name
    is one from outside; the mount's own top is then the container's group.

    Args:
        controller: such as ``cpu``, of version 1; ``UNIFIED`` for version 2.
        cgroup: where groups are mounted, ``/sys/fs/cgroup``.
        proc: ``/proc``; says which group is ours and what is mounted where.
    """
    own, mounts = (read_text(proc / "self" / name) for name in ("cgroup", "mountinfo"))
    return iter(_folders(controller, cgroup, own, mounts))


@lru_cache(maxsize=16)
def _folders(controller: str, cgroup: Path, own: str, mounts: str) -> tuple[Path, ...]:
    """What the two files of ``/proc`` say; they are read anew and parsed when they change."""
    return tuple(_found(controller, cgroup, own, mounts))


def _found(controller: str, cgroup: Path, own: str, mounts: str) -> Iterator[Path]:
    names = list(_own_groups(controller, own))
    for top, shown in _mounts(controller, mounts).items():
        folder = cgroup / top
        yield folder
        for name in names:
            group = name
            if shown != PurePosixPath("/") and name.is_relative_to(shown):
                group = "/" / name.relative_to(shown)
            yield from (folder / str(part)[1:] for part in (group, *group.parents) if part.name)


def read_text(path: Path) -> str:
    """The content of one of the kernel's files; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_number(text: str) -> int | None:
    """A whole number, or None for anything else, such as ``max`` and ``-1``."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _own_groups(controller: str, text: str) -> Iterator[PurePosixPath]:
    for line in text.splitlines():
        _, controllers, name = f"{line}::".split(":", 2)
        name = name.removesuffix("::")
        if controller in controllers.split(","):
            # A group outside our view is written with leading dots.
            yield PurePosixPath(posixpath.normpath(f"/{name.lstrip('/')}"))


def _mounts(controller: str, text: str) -> dict[str, PurePosixPath]:
    """Folders below the mount point, and which group each of them shows at its top."""
    usual = _USUAL_V2 if controller == UNIFIED else _USUAL_V1.get(controller, (controller,))
    found = {place: PurePosixPath("/") for place in usual}
    for line in text.splitlines():
        mount, _, system = line.partition(" - ")
        fields, kind = mount.split(" "), system.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        wanted = kind[0] == "cgroup2" if controller == UNIFIED else kind[0] == "cgroup"
        if not wanted or (controller != UNIFIED and controller not in kind[2].split(",")):
            continue
        shown, point = (PurePosixPath(_unescaped(text)) for text in fields[3:5])
        if point.is_relative_to(_MOUNTED) and ".." not in (*shown.parts, *point.parts):
            place = str(point.relative_to(_MOUNTED))
            found["" if place == "." else place] = shown
    return found


def _unescaped(text: str) -> str:
    """Spaces and the like are written as three octal digits."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
