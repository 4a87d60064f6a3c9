"""CpuLimit: the processors that this process may use, and how many threads are worth having.

A machine's processors are not a process's: affinity (taskset), cpusets and CPU quotas of control
groups (container limits) leave fewer. More threads than that wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_edge.profiles.boards.cgroups import UNIFIED, group_folders, read_number, read_text

_ROOT = Path("/")
_MOST_PROCESSORS = 1 << 16


@dataclass(frozen=True)
class CpuLimit:
    """Processors as the kernel counts them (with SMT several of a core), unless said otherwise.

    Attributes:
        present: processors that are online.
        allowed: those that affinity and cpusets leave.
        cores: physical cores among these.
        quota: processor time per time that the tightest quota grants, such as 1.5; None without.
        threads: that compute at once: one a core and no more than the quota, at least 1.
    """

    present: int
    allowed: int
    cores: int
    quota: float | None = None

    @property
    def threads(self) -> int:
        """See the class."""
        granted = self.cores if self.quota is None else threads_of_quota(self.quota)
        return max(1, min(self.cores, granted))

    @property
    def usable(self) -> int:
        """Processors that may be busy at once: ``allowed``, within the quota; at least 1."""
        granted = self.allowed if self.quota is None else threads_of_quota(self.quota)
        return max(1, min(self.allowed, granted))

    @property
    def limited_by(self) -> Literal["quota", "affinity"] | None:
        """What leaves fewer than the machine has; affinity stands for cpusets as well."""
        if self.quota is not None and self.quota < self.allowed:
            return "quota"
        return "affinity" if self.allowed < self.present else None


def threads_of_quota(quota: float) -> int:
    """Threads for a quota in processors, such as 1.5."""
    return max(1, math.floor(quota))


def read_cpu_limit(root: Path = _ROOT) -> CpuLimit:
    """Count for this process, as it is now.

    Args:
        root: below it lie ``proc`` and ``sys``; another than ``/`` in tests.
    """
    present = _online(root)
    allowed = _affinity(root, present)
    cgroup, proc = root / "sys" / "fs" / "cgroup", root / "proc"
    for cpus in _cpusets(cgroup, proc):
        # What does not overlap is numbered otherwise, as some containers show their processors.
        allowed = allowed & cpus or allowed
    quotas = list(_quotas(cgroup, proc))
    return CpuLimit(
        present=max(len(present), len(allowed)),
        allowed=len(allowed),
        cores=len({_core(root, cpu) for cpu in allowed}),
        quota=min(quotas) if quotas else None,
    )


def parse_cpu_list(text: str) -> frozenset[int]:
    """``0-3,8`` as the kernel writes it; empty where it is nothing of the kind."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        begin, end = read_number(first), read_number(last if dash else first)
        if begin is None or end is None or not begin <= end < _MOST_PROCESSORS:
            return frozenset()
        found.update(range(begin, end + 1))
    return frozenset(found)


def _online(root: Path) -> frozenset[int]:
    """Processors that run; at least one."""
    online = parse_cpu_list(read_text(root / "sys" / "devices" / "system" / "cpu" / "online"))
    if not online:
        lines = read_text(root / "proc" / "cpuinfo").splitlines()
        fields = (line.partition(":") for line in lines)
        numbers = (read_number(value) for key, _, value in fields if key.strip() == "processor")
        online = frozenset(number for number in numbers if number is not None)
    if not online:
        online = frozenset(range((os.cpu_count() or 1) if root == _ROOT else 1))
    return online


def _affinity(root: Path, online: frozenset[int]) -> frozenset[int]:
    if root == _ROOT and hasattr(os, "sched_getaffinity"):
        # Of the thread that asks, whose threads inherit it.
        return frozenset(os.sched_getaffinity(0))
    for line in read_text(root / "proc" / "self" / "status").splitlines():
        key, _, value = line.partition(":")
        if key == "Cpus_allowed_list":
            # It names processors that are not there as well.
            return parse_cpu_list(value) & online or online
    return online


def _cpusets(cgroup: Path, proc: Path) -> Iterator[frozenset[int]]:
    for controller, names in (
        (UNIFIED, ("cpuset.cpus.effective", "cpuset.cpus")),
        ("cpuset", ("cpuset.effective_cpus", "cpuset.cpus")),
    ):
        for folder in group_folders(controller, cgroup, proc):
            lists = (parse_cpu_list(read_text(folder / name)) for name in names)
            # An empty list of a group is that of the group above.
            yield next((cpus for cpus in lists if cpus), frozenset())


def _quotas(cgroup: Path, proc: Path) -> Iterator[float]:
    for folder in group_folders(UNIFIED, cgroup, proc):
        fields = read_text(folder / "cpu.max").split()
        # The period is optional, and then this.
        quota, period = (*fields, "100000")[:2] if fields else ("", "")
        yield from _ratio(quota, period)
    for folder in group_folders("cpu", cgroup, proc):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        yield from _ratio(*(read_text(folder / name) for name in names))


def _ratio(quota: str, period: str) -> Iterator[float]:
    granted, whole = read_number(quota), read_number(period)
    # Version 1 writes no quota as -1, version 2 as max; neither is a number.
    if granted and whole:
        yield granted / whole


def _core(root: Path, cpu: int) -> tuple[int, ...]:
    """What tells the core of a processor from others: the processors that share it."""
    folder = root / "sys" / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if siblings := parse_cpu_list(read_text(folder / name)):
            return tuple(sorted(siblings | {cpu}))
    return (cpu,)
