"""Limits of control groups, from folders laid out as the kernel lays them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_edge.profiles.boards import cgroups
from llava_edge.profiles.boards.cgroup_memory import CgroupMemory, read_cgroup_memory


def free_in_cgroups(root: Path, proc: Path) -> int:
    found = read_cgroup_memory(root, proc)
    assert found is not None
    return found.free_bytes


def group(folder: Path, limit: object, used: int, **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {stat[name]}\n" for name in stat))


def test_files_that_were_read_are_no_memory_that_is_taken(tmp_path: Path) -> None:
    # An artifact of 60,000 bytes that was hashed, of which 20,000 are mapped.
    stat = {"anon": 9000, "inactive_file": 40_000, "active_file": 20_000, "file_mapped": 20_000}
    group(tmp_path, 101_000, 71_000, **stat)
    assert free_in_cgroups(tmp_path, tmp_path) == 101_000 - 71_000 + 40_000

    # Mapped memory that is shared counts there as well, and never against the limit.
    group(tmp_path, 101_000, 71_000, inactive_file=1000, file_mapped=5000)
    assert free_in_cgroups(tmp_path, tmp_path) == 30_000


def test_the_tightest_of_all_groups_around_the_process_counts(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/system.slice/answers.service\n")
    group(root / "system.slice" / "answers.service", 90_000, 1000)
    group(root / "system.slice", "max", 5000)
    assert free_in_cgroups(root, proc) == 89_000
    group(root / "system.slice", 50_000, 5000)
    assert free_in_cgroups(root, proc) == 45_000
    group(root, 20_000, 6000)
    assert free_in_cgroups(root, proc) == 14_000

    assert read_cgroup_memory(root / "system.slice", root) == CgroupMemory(50_000, 45_000)

    # In a container, whose group has another name inside.
    (proc / "self" / "cgroup").write_text("0::/docker/0123abcd\nno group\n\n")
    assert free_in_cgroups(root, proc) == 14_000


def test_the_first_version_of_groups_is_read_as_well(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("9:cpu:/\n4:memory,x:/box\n0::/\n")
    folder = root / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("80000\n")
    (folder / "memory.usage_in_bytes").write_text("30000\n")
    (folder / "memory.stat").write_text("cache 7\ntotal_inactive_file 10000\n")
    assert free_in_cgroups(root, proc) == 60_000
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_cgroup_memory(root, proc) is None


def test_a_group_outside_our_view_is_not_followed(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "sys" / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/../../elsewhere\n")
    group(root, 90_000, 1000)
    group(tmp_path / "elsewhere", 5000, 1000)
    assert free_in_cgroups(root, proc) == 89_000


def test_what_is_mounted_is_parsed_anew_only_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, root, parsed = tmp_path / "proc", tmp_path / "cgroup", []
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/first\n")
    group(root / "first", 90_000, 1000)
    group(root / "second", 50_000, 1000)
    real = cgroups._mounts
    monkeypatch.setattr(cgroups, "_mounts", lambda *given: parsed.append(given) or real(*given))
    assert [free_in_cgroups(root, proc) for _ in range(3)] == [89_000] * 3
    assert len(parsed) == 2  # of both versions
    (proc / "self" / "cgroup").write_text("0::/second\n")
    assert free_in_cgroups(root, proc) == 49_000
    (proc / "self" / "mountinfo").write_text(
        "30 24 0:26 /second /sys/fs/cgroup/unified rw - cgroup2 none rw\n"
    )
    group(root / "unified", 20_000, 1000)
    assert free_in_cgroups(root, proc) == 19_000
