"""Host memory of this process and this machine, read from /proc and control groups."""

from __future__ import annotations

import ctypes
from pathlib import Path

from llava_edge.profiles.boards.cgroup_memory import read_cgroup_memory

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 20


def map_large_blocks() -> bool:
    """Have the C library map every block of 1 MiB and more on its own, for the whole process.

    glibc raises that threshold to the largest block ever freed; weights then share a heap with
    whatever lies between them, and freed ones stay resident. Measured with a full-size tower and
    a 0.6 B decoder: a peak of 4,060 MiB instead of 4,318.

    Returns:
        Whether the C library took the setting; others than glibc have no such growth.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES))
    except (OSError, AttributeError):
        return False


def trim_heap() -> bool:
    """Have the C library give free memory in small pieces back to the system.

    Returns:
        Whether the C library can; others than glibc have no such call.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def peak_host_bytes(proc: Path = _PROC) -> int:
    """VmHWM: the largest resident set this process has had; 0 where the kernel does not say."""
    return _field(proc / "self" / "status", "VmHWM:")


def available_host_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """What can still be taken: MemAvailable, or less where a cgroup limits us; None if unknown."""
    found = [_field(proc / "meminfo", "MemAvailable:")]
    if (group := read_cgroup_memory(cgroup, proc)) is not None:
        # Nothing left is an answer too, unlike nothing said.
        found.append(max(1, group.free_bytes))
    known = [value for value in found if value]
    return min(known) if known else None


def _field(path: Path, name: str) -> int:
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0
