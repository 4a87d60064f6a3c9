"""This machine as a profile: driver, /proc, control groups, device tree.

Memory counts as it is now: what other processes hold is kept back. Rates come from the board's
shipped profile where the board is recognised, else they stay unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llava_edge.profiles.boards.cgroup_memory import read_cgroup_memory
from llava_edge.profiles.boards.cgroups import read_text
from llava_edge.profiles.boards.cpu_limit import CpuLimit, read_cpu_limit
from llava_edge.profiles.boards.device_name import parse_device
from llava_edge.profiles.boards.hardware import HardwareProfile, Int8Isa, load_profile
from llava_edge.profiles.boards.nvml import Gpu, GpuReport, read_gpus
from llava_edge.profiles.errors import ProfileError
from llava_edge.profiles.sizes import GIB, format_bytes

# Whole words of a name, least memory in bytes, shipped profile; the first match counts.
_BOARDS: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("A100",), 60 * GIB, "a100"),
    (("A100",), 0, "a100-40gb"),
    (("H100",), 0, "h100"),
    (("H200",), 0, "h200"),
    (("L40S",), 0, "l40s"),
    (("L4",), 20 * GIB, "l4"),
    (("A10",), 20 * GIB, "a10"),
    (("T4",), 12 * GIB, "t4"),
    (("RTX", "3060"), 10 * GIB, "rtx-3060-12gb"),
    (("RTX", "4060"), 7 * GIB, "rtx-4060-8gb"),
    (("RTX", "4070"), 10 * GIB, "rtx-4070-12gb"),
    (("RTX", "4090"), 20 * GIB, "rtx-4090"),
    (("RTX", "5090"), 28 * GIB, "rtx-5090"),
    (("Thor",), 0, "jetson-thor"),
    (("GB10",), 0, "dgx-spark"),
    (("Orin", "Nano"), 5 * GIB, "jetson-orin-nano-8gb"),
    (("Orin", "NX"), 12 * GIB, "jetson-orin-nx-16gb"),
    (("Orin",), 40 * GIB, "jetson-agx-orin-64gb"),
    (("Orin",), 20 * GIB, "jetson-agx-orin-32gb"),
)
# Words that make another board of a name.
_OTHERS = frozenset({"Ti", "SUPER", "Laptop", "NVL", "PCIe", "D"})


@dataclass(frozen=True)
class MachineFacts:
    """What was found, before it becomes a profile.

    ``memory_bytes`` is installed memory or the control group's limit, whichever is less;
    ``available_bytes`` what of it can be taken now. ``cpu_cores`` are threads that may compute at
    once here (``CpuLimit.threads``); ``cpus`` tells where they come from.
    """

    memory_bytes: int
    available_bytes: int
    limited_by_cgroup: bool
    cpu_model: str
    cpu_cores: int
    int8_isa: Int8Isa
    board: str | None
    gpus: GpuReport
    cpus: CpuLimit | None = None


def read_machine(root: Path = Path("/"), gpus: GpuReport | None = None) -> MachineFacts:
    """Look at the machine; ``root`` and ``gpus`` stand in for it in tests.

    Raises:
        ProfileError: the kernel does not say how much memory there is.
    """
    meminfo = _meminfo(root / "proc" / "meminfo")
    total = meminfo.get("MemTotal", 0)
    if not total:
        raise ProfileError(
            f"{root}proc/meminfo does not say how much memory there is. Name a board with "
            "--profile, or a GPU's memory with --vram."
        )
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", total))
    group = read_cgroup_memory(root / "sys" / "fs" / "cgroup", root / "proc")
    limited = group is not None and group.limit_bytes < total
    if group is not None and limited:
        total = group.limit_bytes
        available = min(available, group.free_bytes)
    cpu = read_text(root / "proc" / "cpuinfo")
    cpus = read_cpu_limit(root)
    return MachineFacts(
        memory_bytes=total,
        available_bytes=min(available, total),
        limited_by_cgroup=limited,
        cpu_model=read_cpu_model(cpu),
        cpu_cores=cpus.threads,
        int8_isa=read_int8_isa(cpu),
        board=read_board(root),
        gpus=read_gpus() if gpus is None else gpus,
        cpus=cpus,
    )


def detect_profile(facts: MachineFacts | None = None, device: str = "auto") -> HardwareProfile:
    """This machine as a profile.

    Args:
        facts: what was found; None looks now.
        device: ``cpu`` leaves the GPU aside; ``cuda:1`` plans for that GPU alone.

    Raises:
        RequestError: there is no device of that name.
        ProfileError: ``cuda`` was asked and there is no GPU, or nothing is left to plan with.
    """
    asked = parse_device(device)
    facts = read_machine() if facts is None else facts
    gpus = facts.gpus.gpus
    if asked.kind == "cuda" and (gpus or facts.gpus.hidden):
        gpu = facts.gpus.number(asked.gpu)
    else:
        gpu = gpus[0] if gpus else None
    unified = facts.board is not None or (gpu is not None and gpu.total_bytes is None)
    if asked.kind == "cuda" and gpu is None and not (unified and asked.gpu == 0):
        raise ProfileError(
            f"--device {device} was asked, but the driver shows no NVIDIA GPU"
            f"{' of that number' if unified else ''}"
            f"{': ' + facts.gpus.problem if facts.gpus.problem else ''}. Run llava-edge doctor."
        )
    if asked.kind == "cpu" or not (gpu or unified):
        return _checked(_cpu_profile(facts))
    if gpu is None or unified:
        return _checked(_unified_profile(facts, gpu))
    return _checked(_gpu_profile(facts, gpu, alone=asked.index is not None))


def read_int8_isa(cpuinfo: str) -> Int8Isa:
    """Best int8 instructions in the flags of ``/proc/cpuinfo``."""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
    if "amx_int8" in flags:
        return "amx"
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "vnni"
    return "neon-dot" if "asimddp" in flags else "none"


def read_cpu_model(cpuinfo: str) -> str:
    """What ``/proc/cpuinfo`` calls the processor."""
    return _cpu_field(cpuinfo, "model name") or _cpu_field(cpuinfo, "CPU part") or "unknown"


def read_board(root: Path = Path("/")) -> str | None:
    """Name of a board with unified memory, as the device tree has it."""
    model = read_text(root / "proc" / "device-tree" / "model").strip("\0 \n")
    return model if "Jetson" in model or "DGX Spark" in model else None


def known_board(name: str, memory_bytes: int) -> HardwareProfile | None:
    """Shipped profile of the board with this name, if it is one of them."""
    found = set(name.replace("-", " ").split())
    if found & _OTHERS:
        return None
    for words, least, profile in _BOARDS:
        if found.issuperset(words) and memory_bytes >= least:
            return load_profile(profile)
    return None


def _cpu_profile(facts: MachineFacts) -> HardwareProfile:
    base = load_profile("cpu-16gb")
    sources = {
        "memory": "control group limit" if facts.limited_by_cgroup else "MemTotal in /proc/meminfo",
        "system_reserve": "what other processes hold now",
        "int8_isa": "flags in /proc/cpuinfo",
    }
    return replace(
        base,
        name="this-machine",
        title=f"{facts.cpu_model}, {facts.cpu_cores} threads",
        memory_bytes=facts.memory_bytes,
        system_reserve_bytes=facts.memory_bytes - facts.available_bytes,
        host_memory_bytes=facts.memory_bytes,
        host_reserve_bytes=facts.memory_bytes - facts.available_bytes,
        bandwidth=None,
        peak_fp16=None,
        peak_int8=None,
        int8_isa=facts.int8_isa,
        sources=sources,
    )


def _gpu_profile(facts: MachineFacts, first: Gpu, *, alone: bool) -> HardwareProfile:
    # A model is spread evenly, so the smallest of several decides; a plan for one takes the first.
    alike = [first] if alone else [g for g in facts.gpus.gpus if g.name == first.name]
    total = min(_known(g.total_bytes) for g in alike)
    free = min(_known(g.free_bytes) for g in alike)
    board = known_board(first.name, total)
    base = board or load_profile("rtx-4090")
    return replace(
        base,
        name="this-machine",
        title=f"{len(alike)} x {first.name}" if len(alike) > 1 else first.name,
        memory_bytes=total,
        system_reserve_bytes=total - free,
        host_memory_bytes=facts.memory_bytes,
        host_reserve_bytes=facts.memory_bytes - facts.available_bytes,
        bandwidth=board.bandwidth if board else None,
        peak_fp16=board.peak_fp16 if board else None,
        peak_int8=board.peak_int8 if board else None,
        compute_capability=first.compute_capability,
        int8_isa=facts.int8_isa,
        num_devices=len(alike),
        sources=_board_sources(board, "the driver (NVML)"),
    )


def _unified_profile(facts: MachineFacts, gpu: Gpu | None) -> HardwareProfile:
    gpu = gpu or Gpu("", None, None, None)
    name = facts.board or gpu.name
    board = known_board(name, facts.memory_bytes)
    base = board or load_profile("jetson-orin-nano-8gb")
    return replace(
        base,
        name="this-machine",
        title=name,
        memory_bytes=facts.memory_bytes,
        system_reserve_bytes=facts.memory_bytes - facts.available_bytes,
        host_memory_bytes=facts.memory_bytes,
        host_reserve_bytes=facts.memory_bytes - facts.available_bytes,
        bandwidth=board.bandwidth if board else None,
        peak_fp16=board.peak_fp16 if board else None,
        peak_int8=board.peak_int8 if board else None,
        compute_capability=gpu.compute_capability or (board.compute_capability if board else None),
        int8_isa=facts.int8_isa,
        sources=_board_sources(board, "MemTotal in /proc/meminfo"),
    )


def _board_sources(board: HardwareProfile | None, memory: str) -> dict[str, str]:
    sources = {"memory": memory, "system_reserve": "what is in use now"}
    if board is not None:
        rates = ("bandwidth", "peak_fp16", "peak_int8")
        sources |= {key: board.sources[key] for key in rates if key in board.sources}
    return sources


def _known(value: int | None) -> int:
    return 0 if value is None else value


def _checked(profile: HardwareProfile) -> HardwareProfile:
    if profile.budget_bytes <= 0:
        raise ProfileError(
            f"{profile.title}: all of its {format_bytes(profile.memory_bytes)} are in use. "
            "Stop what holds them, or name a board with --profile."
        )
    return profile


def _meminfo(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in read_text(path).splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[key.strip()] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _cpu_field(cpuinfo: str, key: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
