"""NVIDIA's management library through ctypes: which GPUs there are and how much they hold.

Nothing is installed for this: the library comes with the driver. No driver means no GPUs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

_SUCCESS = 0
_NAME_BYTES = 96
_MOST_PROCESSES = 256
_NOT_KNOWN = (1 << 64) - 1
"""What the driver writes in place of a size that it does not tell."""
_LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so")


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it.

    ``total_bytes`` and ``free_bytes`` are None on boards that share the host's memory.
    """

    name: str
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: str | None


@dataclass(frozen=True)
class GpuReport:
    """What the library said; ``problem`` is empty where all went well or there is no library."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    problem: str = ""


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def read_gpus(library: Any = None) -> GpuReport:
    """Ask the driver; ``library`` stands in for the shared library in tests."""
    nvml = library if library is not None else _open()
    if nvml is None:
        return GpuReport()
    try:
        code = nvml.nvmlInit_v2()
        if code != _SUCCESS:
            return GpuReport(problem=f"nvmlInit failed with code {code}; check the driver")
        try:
            return _read(nvml)
        finally:
            nvml.nvmlShutdown()
    except (AttributeError, OSError, ctypes.ArgumentError) as error:
        return GpuReport(problem=f"the management library cannot be used: {error}")


def process_bytes(pid: int, library: Any = None) -> int | None:
    """Device memory that a process holds, over all GPUs, as the driver counts it.

    Args:
        pid: of the process, as the driver sees it; a container may number otherwise.
        library: stands in for the shared library in tests.

    Returns:
        Bytes, the context of the driver included; None where the driver does not list the process,
        or there is none.
    """
    nvml = library if library is not None else _started()
    if nvml is None:
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
            return None
        held = [_held(nvml, index, pid) for index in range(min(count.value, 64))]
    except (AttributeError, ctypes.ArgumentError):
        return None
    known = [size for size in held if size is not None]
    return sum(known) if known else None


@cache
def _started() -> Any:
    """The library, started once for this process: it is asked at every answer."""
    nvml = _open()
    try:
        return nvml if nvml is not None and nvml.nvmlInit_v2() == _SUCCESS else None
    except AttributeError:
        return None


def _held(nvml: Any, index: int, pid: int) -> int | None:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _SUCCESS:
        return None
    count = ctypes.c_uint(_MOST_PROCESSES)
    listed = (_Process * _MOST_PROCESSES)()
    code = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), listed)
    if code != _SUCCESS:
        return None
    sizes = [int(listed[place].used) for place in range(count.value) if listed[place].pid == pid]
    return sum(sizes) if sizes and _NOT_KNOWN not in sizes else None


def _open() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _read(nvml: Any) -> GpuReport:
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
        return GpuReport(problem="the driver does not say how many GPUs there are")
    gpus = [_device(nvml, index) for index in range(min(count.value, 64))]
    driver = ctypes.create_string_buffer(_NAME_BYTES)
    known = nvml.nvmlSystemGetDriverVersion(driver, _NAME_BYTES) == _SUCCESS
    return GpuReport(tuple(g for g in gpus if g is not None), _text(driver) if known else None)


def _device(nvml: Any, index: int) -> Gpu | None:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _SUCCESS:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    named = nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES) == _SUCCESS
    memory = _Memory()
    # Boards with unified memory answer "not supported" here.
    sized = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == _SUCCESS
    major, minor = ctypes.c_int(), ctypes.c_int()
    capable = (
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        == _SUCCESS
    )
    return Gpu(
        name=_text(name) if named else "NVIDIA GPU",
        total_bytes=int(memory.total) if sized and memory.total else None,
        free_bytes=int(memory.free) if sized and memory.total else None,
        compute_capability=f"{major.value}.{minor.value}" if capable else None,
    )


def _text(buffer: Any) -> str:
    raw: bytes = buffer.value
    return raw.decode("utf-8", errors="replace")
