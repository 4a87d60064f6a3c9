import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_edge.profiles.boards.detect import (
    MachineFacts,
    detect_profile,
    known_board,
    read_int8_isa,
    read_machine,
)
from llava_edge.profiles.boards.nvml import Gpu, GpuReport, process_bytes, read_gpus
from llava_edge.profiles.errors import ProfileError

GIB = 1 << 30
KIB_16 = 16 << 20
NO_GPU = GpuReport()
A100 = Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB, "8.0")

MakeRoot = Callable[..., Path]


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    """Builds a file system that looks like a machine."""

    def build(**files: str) -> Path:
        defaults = {
            "proc/meminfo": f"MemTotal: {KIB_16} kB\nMemAvailable: {KIB_16 // 2} kB\n",
            "proc/cpuinfo": (
                "processor : 0\nmodel name : Some CPU\nflags : sse avx512_vnni\n"
                "processor : 1\nmodel name : Some CPU\n"
            ),
        }
        for name, text in {**defaults, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def facts(board: str | None = None, *gpus: Gpu, memory: int = 64 * GIB) -> MachineFacts:
    return MachineFacts(
        memory, memory // 2, False, "Some CPU", 8, "vnni", board, GpuReport(tuple(gpus), "1")
    )


def test_memory_and_cpu_are_read_from_proc(make_root: MakeRoot) -> None:
    found = read_machine(make_root(), NO_GPU)
    assert (found.memory_bytes, found.available_bytes) == (16 * GIB, 8 * GIB)
    assert (found.cpu_model, found.cpu_cores, found.int8_isa) == ("Some CPU", 2, "vnni")
    assert not found.limited_by_cgroup


def test_a_machine_counts_the_processors_that_are_allowed(make_root: MakeRoot) -> None:
    found = read_machine(make_root(**{"sys/fs/cgroup/cpu.max": "100000 100000\n"}), NO_GPU)
    assert found.cpu_cores == 1
    assert detect_profile(found).title == "Some CPU, 1 threads"


@pytest.mark.parametrize(
    "files",
    [
        {
            "sys/fs/cgroup/memory.max": str(4 * GIB),
            "sys/fs/cgroup/memory.current": str(GIB),
        },
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": str(4 * GIB),
            "sys/fs/cgroup/a/memory.current": str(GIB),
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        },
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": str(9 * GIB),
            "sys/fs/cgroup/a/b/memory.max": str(4 * GIB),
            "sys/fs/cgroup/a/b/memory.current": str(GIB),
        },
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        },
    ],
    ids=["version 2", "limit on the parent", "tighter than the parent", "version 1"],
)
def test_a_control_group_limits_the_memory(make_root: MakeRoot, files: dict[str, str]) -> None:
    found = read_machine(make_root(**files), NO_GPU)
    assert (found.memory_bytes, found.available_bytes) == (4 * GIB, 3 * GIB)
    assert found.limited_by_cgroup


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", "", "-5", "many"])
def test_a_group_without_a_real_limit_changes_nothing(make_root: MakeRoot, limit: str) -> None:
    found = read_machine(make_root(**{"sys/fs/cgroup/memory.max": limit}), NO_GPU)
    assert found.memory_bytes == 16 * GIB


def test_a_group_path_cannot_leave_the_group_folder(make_root: MakeRoot) -> None:
    root = make_root(**{"proc/self/cgroup": "0::/../../..\n", "memory.max": "5"})
    assert read_machine(root, NO_GPU).memory_bytes == 16 * GIB


def test_a_machine_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="--profile"):
        read_machine(tmp_path, NO_GPU)


@pytest.mark.parametrize(
    ("line", "isa"),
    [
        ("flags : avx512_vnni amx_int8", "amx"),
        ("flags : avx_vnni", "vnni"),
        ("flags : avx2 avx512f", "none"),
        ("Features : fp asimd asimddp", "neon-dot"),
        ("model name : avx512_vnni", "none"),
        ("", "none"),
    ],
)
def test_int8_instructions_follow_from_the_flags(line: str, isa: str) -> None:
    assert read_int8_isa(line) == isa


def test_a_cpu_machine_plans_with_what_is_free_and_knows_no_rates(make_root: MakeRoot) -> None:
    profile = detect_profile(read_machine(make_root(), NO_GPU))
    assert (profile.name, profile.kind) == ("this-machine", "cpu")
    assert profile.budget_bytes == profile.host_budget_bytes == 8 * GIB
    assert profile.bandwidth is None


def test_a_known_gpu_brings_its_rates() -> None:
    profile = detect_profile(facts(None, A100))
    assert (profile.kind, profile.budget_bytes) == ("cuda", 79 * GIB)
    assert profile.bandwidth == 2.039e12
    assert profile.compute_capability == "8.0"
    assert profile.host_budget_bytes == 32 * GIB


def test_several_equal_gpus_count_and_the_fullest_decides() -> None:
    fuller = Gpu(A100.name, 80 * GIB, 40 * GIB, "8.0")
    other = Gpu("NVIDIA T4", 15 * GIB, 15 * GIB, "7.5")
    profile = detect_profile(facts(None, A100, fuller, other))
    assert (profile.num_devices, profile.budget_bytes) == (2, 40 * GIB)


def test_an_unknown_gpu_has_memory_but_no_rates() -> None:
    profile = detect_profile(facts(None, Gpu("NVIDIA Future 1", 10 * GIB, 9 * GIB, "13.0")))
    assert (profile.budget_bytes, profile.bandwidth) == (9 * GIB, None)
    assert profile.compute_capability == "13.0"


def test_the_gpu_can_be_left_aside() -> None:
    assert detect_profile(facts(None, A100), "cpu").kind == "cpu"
    with pytest.raises(ProfileError, match="no NVIDIA GPU"):
        detect_profile(facts(), "cuda")


def test_a_jetson_is_known_by_its_device_tree(make_root: MakeRoot) -> None:
    model = "NVIDIA Jetson Orin Nano Developer Kit\0"
    found = read_machine(make_root(**{"proc/device-tree/model": model}), NO_GPU)
    profile = detect_profile(found)
    assert (profile.kind, profile.compute_capability) == ("unified", "8.7")
    assert profile.title == "NVIDIA Jetson Orin Nano Developer Kit"
    assert profile.bandwidth == 68e9


def test_a_gpu_without_memory_of_its_own_is_unified() -> None:
    profile = detect_profile(facts(None, Gpu("NVIDIA GB10", None, None, "12.1")))
    assert (profile.kind, profile.rtx_target) == ("unified", "SM121")
    assert profile.budget_bytes == 32 * GIB


@pytest.mark.parametrize(
    ("name", "gib", "board"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA L40S", 44, "l40s"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30, "jetson-agx-orin-32gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, None),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8, None),
        ("NVIDIA A10G", 22, None),
        ("NVIDIA L40", 44, None),
    ],
)
def test_boards_are_recognised_and_their_namesakes_are_not(
    name: str, gib: int, board: str | None
) -> None:
    found = known_board(name, gib * GIB)
    assert (found.name if found else None) == board


def test_a_full_machine_is_an_error(make_root: MakeRoot) -> None:
    root = make_root(**{"proc/meminfo": f"MemTotal: {KIB_16} kB\nMemAvailable: 0 kB\n"})
    with pytest.raises(ProfileError, match="are in use"):
        detect_profile(read_machine(root, NO_GPU))


class FakeNvml:
    """Stands in for the driver's library, called as ctypes calls it."""

    def __init__(self, init: int = 0, memory: int = 0) -> None:
        self.init, self.memory, self.stopped = init, memory, False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.init

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.stopped = True
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: int) -> int:  # noqa: N802
        buffer.value = b"580.1"
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: int) -> int:  # noqa: N802
        buffer.value = b"NVIDIA L4"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free = 22 * GIB, 21 * GIB
        return self.memory

    def nvmlDeviceGetCudaComputeCapability(  # noqa: N802
        self, handle: Any, major: Any, minor: Any
    ) -> int:
        major._obj.value, minor._obj.value = 8, 9
        return 0


class ProcessNvml(FakeNvml):
    """Two GPUs; a process is listed on both."""

    def __init__(self, held: dict[int, tuple[int, int]], code: int = 0) -> None:
        super().__init__()
        self.held, self.code = held, code

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(  # noqa: N802
        self, handle: Any, count: Any, listed: Any
    ) -> int:
        assert len(listed) >= len(self.held)
        for place, (pid, sizes) in enumerate(self.held.items()):
            listed[place].pid, listed[place].used = pid, sizes[handle.value - 1]
        count._obj.value = len(self.held)
        return self.code


def test_memory_of_a_process_is_summed_over_gpus() -> None:
    untold = (1 << 64) - 1
    library = ProcessNvml({7: (3 * GIB, 0), 9: (GIB, 2 * GIB), 11: (untold, untold)})

    assert process_bytes(9, library) == 3 * GIB
    assert process_bytes(8, library) is None, "no such process"
    assert process_bytes(11, library) is None, "the driver does not tell"
    assert process_bytes(9, ProcessNvml({9: (1, 1)}, code=3)) is None
    assert process_bytes(9, object()) is None


def test_the_driver_is_asked_and_let_go() -> None:
    library = FakeNvml()
    assert read_gpus(library) == GpuReport((Gpu("NVIDIA L4", 22 * GIB, 21 * GIB, "8.9"),), "580.1")
    assert library.stopped


def test_memory_that_is_not_supported_is_unknown() -> None:
    (gpu,) = read_gpus(FakeNvml(memory=3)).gpus
    assert (gpu.total_bytes, gpu.free_bytes) == (None, None)


def test_a_driver_that_does_not_start_is_reported() -> None:
    assert "code 9" in read_gpus(FakeNvml(init=9)).problem


def test_a_library_of_another_kind_is_reported() -> None:
    assert "cannot be used" in read_gpus(object()).problem


def test_no_library_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert read_gpus() == GpuReport()
