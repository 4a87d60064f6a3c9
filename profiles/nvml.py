"""NVIDIA's management library through ctypes: which GPUs there are and how much they hold.

Nothing is installed for this: the library comes with the driver. No driver means no GPUs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_SUCCESS = 0
_NAME_BYTES = 96
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
