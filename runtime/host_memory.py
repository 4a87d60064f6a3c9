"""Host memory of this process and this machine, read from /proc and the cgroup."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def peak_host_bytes(proc: Path = _PROC) -> int:
    """VmHWM: the largest resident set this process has had; 0 where the kernel does not say."""
    return _field(proc / "self" / "status", "VmHWM:")


def available_host_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int | None:
    """What can still be taken: MemAvailable, or less where a cgroup limits us; None if unknown."""
    found = [_field(proc / "meminfo", "MemAvailable:"), _cgroup_free(cgroup)]
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


def _cgroup_free(cgroup: Path) -> int:
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = (cgroup / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return 0
    return 0 if limit == "max" else max(int(limit) - int(used), 1)
