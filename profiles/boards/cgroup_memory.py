"""Limits that control groups set to the memory of this process, of both versions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_edge.profiles.boards.cgroups import UNIFIED, group_folders, read_number, read_text


@dataclass(frozen=True)
class _Files:
    """Where a version keeps its numbers, all in bytes.

    ``cache``: pages of files, which the kernel gives up as it needs them. ``mapped``: those among
    them that programs use, as weights that are mapped.
    """

    controller: str
    limit: str
    used: str
    cache: tuple[str, ...]
    mapped: str


_VERSIONS = (
    _Files(
        controller=UNIFIED,
        limit="memory.max",
        used="memory.current",
        cache=("inactive_file", "active_file"),
        mapped="file_mapped",
    ),
    _Files(
        controller="memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        cache=("total_inactive_file", "total_active_file"),
        mapped="total_mapped_file",
    ),
)


@dataclass(frozen=True)
class CgroupMemory:
    """Of the process's own group and of all that hold it.

    Attributes:
        limit_bytes: the smallest limit.
        free_bytes: the least that a limit leaves, at least 0.
    """

    limit_bytes: int
    free_bytes: int


def read_cgroup_memory(root: Path, proc: Path) -> CgroupMemory | None:
    """The tightest limits; None without any.

    A limit counts pages of files as used, such as an artifact that was just hashed, although they
    make room when asked. They count as free here, as in the system's ``MemAvailable``, but for
    those that are mapped.

    Args:
        root: where groups are mounted, ``/sys/fs/cgroup``.
        proc: ``/proc``; says which group is ours. In a container that may be a name from outside,
            and then the mount's own top is the container's.

    Source: Linux ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
    """
    found = [
        limits
        for version in _VERSIONS
        for folder in group_folders(version.controller, root, proc)
        if (limits := _limits(version, folder)) is not None
    ]
    if not found:
        return None
    return CgroupMemory(
        min(limits.limit_bytes for limits in found), min(limits.free_bytes for limits in found)
    )


def _limits(version: _Files, folder: Path) -> CgroupMemory | None:
    limit = read_number(read_text(folder / version.limit))
    # Version 1 writes no limit as the largest number of whole pages.
    if limit is None or limit >= 1 << 62:
        return None
    fields = (line.partition(" ") for line in read_text(folder / "memory.stat").splitlines())
    stat = {name: read_number(value) or 0 for name, _, value in fields}
    cache = sum(stat.get(name, 0) for name in version.cache) - stat.get(version.mapped, 0)
    used = read_number(read_text(folder / version.used)) or 0
    return CgroupMemory(limit, max(0, limit - max(0, used - max(0, cache))))
