"""Processors that a process may use, from trees laid out as the kernel lays them out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_edge.profiles.boards.cpu_limit import CpuLimit, parse_cpu_list, read_cpu_limit

MakeRoot = Callable[..., Path]
V1_CPU = "sys/fs/cgroup/cpu"
V1_MOUNT = "30 20 0:26 {} /sys/fs/cgroup/{} rw,nosuid shared:9 - cgroup cgroup rw,{}\n"
POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    """Builds a machine of so many processors; ``smt`` of them make a core."""

    def build(files: dict[str, str], processors: int = 8, smt: int = 1) -> Path:
        system = "sys/devices/system/cpu"
        found = {f"{system}/online": f"0-{processors - 1}\n"}
        for cpu in range(processors):
            first = cpu - cpu % smt
            siblings = ",".join(str(first + place) for place in range(smt))
            found[f"{system}/cpu{cpu}/topology/thread_siblings_list"] = f"{siblings}\n"
        for name, text in {**found, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def v1_quota(quota: object, folder: str = V1_CPU, period: object = 100_000) -> dict[str, str]:
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


def test_without_limits_every_core_computes(make_root: MakeRoot) -> None:
    assert read_cpu_limit(make_root({})) == CpuLimit(8, 8, 8)
    assert read_cpu_limit(make_root({})).limited_by is None


@pytest.mark.parametrize(
    "files",
    [
        # docker run --cpus 2, version 2, with a namespace of its own: the mount's top is the group.
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        # The same as it looks from the host.
        {
            "proc/self/cgroup": "0::/system.slice/docker-12ab.scope\n",
            "sys/fs/cgroup/system.slice/docker-12ab.scope/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
        },
        # A pod's quota stands above those of its containers.
        {
            "proc/self/cgroup": f"0::/{POD}/cri-containerd-7.scope\n",
            f"sys/fs/cgroup/{POD}/cri-containerd-7.scope/cpu.max": "max 100000\n",
            f"sys/fs/cgroup/{POD}/cpu.max": "100000 50000\n",
        },
        # docker, version 1: the name is from outside, the mount shows the container's own group.
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/12ab\n3:cpuset:/docker/12ab\n",
            **v1_quota(200_000),
        },
        # Without the links that most systems have.
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/12ab\n",
            **v1_quota(200_000, "sys/fs/cgroup/cpu,cpuacct"),
        },
        # A group that was made inside of the container.
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/12ab/answers\n",
            "proc/self/mountinfo": V1_MOUNT.format("/docker/12ab", "cpu,cpuacct", "cpu,cpuacct"),
            **v1_quota(-1, "sys/fs/cgroup/cpu,cpuacct"),
            **v1_quota(200_000, "sys/fs/cgroup/cpu,cpuacct/answers"),
        },
        # A controller that is mounted by another name.
        {
            "proc/self/cgroup": "4:cpu:/\n",
            "proc/self/mountinfo": V1_MOUNT.format("/", "my\\040cpus", "cpu"),
            **v1_quota(200_000, "sys/fs/cgroup/my cpus"),
        },
        # A pod, version 1, as the host sees it.
        {
            "proc/self/cgroup": "11:cpu,cpuacct:/kubepods/burstable/pod1/7\n0::/\n",
            **v1_quota(-1, f"{V1_CPU}/kubepods/burstable/pod1/7"),
            **v1_quota(50_000, f"{V1_CPU}/kubepods/burstable/pod1", 25_000),
            **v1_quota(-1, f"{V1_CPU}/kubepods"),
        },
        # Both versions mounted; the one in use has the quota.
        {
            "proc/self/cgroup": "4:cpu:/box\n0::/user.slice\n",
            **v1_quota(200_000, f"{V1_CPU}/box"),
            "sys/fs/cgroup/unified/user.slice/cgroup.procs": "1\n",
        },
        {
            "proc/self/cgroup": "0::/user.slice\n",
            "sys/fs/cgroup/unified/user.slice/cpu.max": "200000 100000\n",
        },
        # The period may be left out.
        {"sys/fs/cgroup/cpu.max": "200000\n"},
        # A colon belongs to a name.
        {"proc/self/cgroup": "0::/a:b\n", "sys/fs/cgroup/a:b/cpu.max": "200000 100000\n"},
    ],
    ids=[
        "docker v2",
        "docker v2 from the host",
        "pod v2",
        "docker v1",
        "docker v1 without links",
        "group inside docker v1",
        "mounted elsewhere",
        "pod v1",
        "hybrid, version 1",
        "hybrid, version 2",
        "no period",
        "colon",
    ],
)
def test_a_quota_of_two_processors_gives_two_threads(
    make_root: MakeRoot, files: dict[str, str]
) -> None:
    found = read_cpu_limit(make_root(files))
    assert (found.quota, found.threads, found.usable) == (2.0, 2, 2)
    assert (found.allowed, found.limited_by) == (8, "quota")


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/cpu.max": "max 100000\n"},
        {"sys/fs/cgroup/cpu.max": "max\n"},
        {"sys/fs/cgroup/cpu.max": ""},
        {"sys/fs/cgroup/cpu.max": "many things\n"},
        {"sys/fs/cgroup/cpu.max": "-200000 100000\n"},
        {"sys/fs/cgroup/cpu.max": "200000 0\n"},
        {"sys/fs/cgroup/cpu.max": "0 100000\n"},
        {"sys/fs/cgroup/cpu.max": f"{'9' * 400} 100000\n"},
        {"sys/fs/cgroup/cpu.max/x": "a folder"},
        {"sys/fs/cgroup/cpuset.cpus.effective": "0-7,9-\n"},
        {"sys/fs/cgroup/cpuset.cpus.effective": "99999999999-1\n"},
        {"sys/fs/cgroup/cpuset.cpus.effective": "0-9999999999\n"},
        {"sys/fs/cgroup/cpuset.cpus.effective": "\n", "sys/fs/cgroup/cpuset.cpus": "\n"},
        # Numbered from another place.
        {"sys/fs/cgroup/cpuset.cpus.effective": "64-71\n"},
        {"proc/self/status": "Cpus_allowed:\tff\nCpus_allowed_list:\tall\n"},
        {"proc/self/status": "\0\0", "proc/self/cgroup": "\0:\0", "proc/self/mountinfo": "- \n"},
        {"proc/self/mountinfo": V1_MOUNT.format("/..", "../../..", "cpu"), **v1_quota(1, "x")},
        v1_quota(-1),
        {f"{V1_CPU}/cpu.cfs_quota_us": "200000\n"},
    ],
)
def test_what_says_no_limit_or_nothing_sensible_limits_nothing(
    make_root: MakeRoot, files: dict[str, str]
) -> None:
    found = read_cpu_limit(make_root(files))
    assert (found.threads, found.allowed, found.quota) == (8, 8, None)


def test_the_tightest_quota_of_all_groups_counts(make_root: MakeRoot) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/a/b/cpu.max": "600000 100000\n",
        "sys/fs/cgroup/elsewhere/cpu.max": "100000 100000\n",
    }
    assert read_cpu_limit(make_root(files)).threads == 3


@pytest.mark.parametrize(
    ("quota", "threads"), [(1_000, 1), (50_000, 1), (100_000, 1), (250_000, 2), (999_000, 8)]
)
def test_a_part_of_a_processor_is_no_thread_but_the_first(
    make_root: MakeRoot, quota: int, threads: int
) -> None:
    found = read_cpu_limit(make_root({"sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}))
    assert found.threads == threads
    assert (found.limited_by == "quota") == (quota < 800_000)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/status": "Name:\tx\nCpus_allowed_list:\t1,4-5\n"},
        {"sys/fs/cgroup/cpuset.cpus.effective": "1,4-5\n"},
        {"sys/fs/cgroup/cpuset.cpus": "1,4-5\n"},
        {
            "proc/self/cgroup": "3:cpuset:/docker/12ab\n0::/\n",
            "sys/fs/cgroup/cpuset/docker/12ab/cpuset.effective_cpus": "1,4-5\n",
            "sys/fs/cgroup/cpuset/cpuset.cpus": "0-7\n",
        },
        {
            "proc/self/cgroup": "3:cpuset:/box\n0::/\n",
            "sys/fs/cgroup/cpuset/box/cpuset.cpus": "1,4-5\n",
        },
        # Affinity and cpuset overlap; neither alone says it.
        {
            "proc/self/status": "Cpus_allowed_list:\t0-1,4-5\n",
            "sys/fs/cgroup/cpuset.cpus.effective": "1-7\n",
        },
        # A quota that is larger than the set.
        {
            "proc/self/status": "Cpus_allowed_list:\t1,4-5\n",
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
        },
    ],
    ids=["affinity", "v2", "v2, not effective", "v1", "v1, not effective", "both", "large quota"],
)
def test_affinity_and_cpusets_leave_what_they_name(
    make_root: MakeRoot, files: dict[str, str]
) -> None:
    found = read_cpu_limit(make_root(files))
    assert (found.present, found.allowed, found.threads) == (8, 3, 3)
    assert found.limited_by == "affinity"


def test_processors_that_share_a_core_are_one_thread(make_root: MakeRoot) -> None:
    assert read_cpu_limit(make_root({}, smt=2)) == CpuLimit(8, 8, 4)
    root = make_root({"proc/self/status": "Cpus_allowed_list:\t0-2\n"}, smt=2)
    found = read_cpu_limit(root)
    assert (found.allowed, found.threads, found.usable) == (3, 2, 3)


def test_processors_that_are_off_do_not_count(make_root: MakeRoot) -> None:
    online = {"sys/devices/system/cpu/online": "0-1,6\n"}
    listed = {"proc/self/status": "Cpus_allowed_list:\t0-127\n"}
    assert read_cpu_limit(make_root({**online, **listed})) == CpuLimit(3, 3, 3)


def test_a_machine_that_says_little_has_the_processors_of_cpuinfo_or_one(tmp_path: Path) -> None:
    assert read_cpu_limit(tmp_path) == CpuLimit(1, 1, 1)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("processor : 0\n\nprocessor\t: 1\nProcessor : ARM\n")
    assert read_cpu_limit(tmp_path) == CpuLimit(2, 2, 2)


@pytest.mark.parametrize(
    ("text", "count"), [("0-3,8,10-11\n", 7), ("5", 1), ("", 0), ("3-1", 0), ("a", 0), ("-1", 0)]
)
def test_lists_of_processors_are_read_as_the_kernel_writes_them(text: str, count: int) -> None:
    assert len(parse_cpu_list(text)) == count


def test_this_process_counts_what_its_own_affinity_leaves() -> None:
    code = (
        "import os; from llava_edge.profiles.boards.cpu_limit import read_cpu_limit as read\n"
        "os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}); print(read().threads)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"1\n"
