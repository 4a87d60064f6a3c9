"""The GPUs that CUDA shows to this process: NVIDIA's management library through ctypes.

Nothing is installed for this: the library comes with the driver. No driver means no GPUs. The
library lists all GPUs by their place on the bus; CUDA hides some and counts in an order of its own.
Both are matched by UUID and PCI id, so that ``gpus[1]`` is what computes as ``cuda:1``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llava_edge.profiles.boards.cuda_devices import (
    ORDER,
    VISIBLE,
    CudaDevice,
    list_cuda_devices,
    plain_pci_id,
)
from llava_edge.profiles.boards.cuda_visible import visible_places
from llava_edge.profiles.boards.gpu_report import Gpu, GpuReport

__all__ = ["Gpu", "GpuReport", "process_bytes", "read_gpus"]

_SUCCESS = 0
_NAME_BYTES = 96
_MOST_PROCESSES = 256
_NOT_KNOWN = (1 << 64) - 1
"""What the driver writes in place of a size that it does not tell."""
_LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so")


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Pci(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("short_id", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("maker", ctypes.c_uint),
        ("board", ctypes.c_uint),
        ("id", ctypes.c_char * 32),
    )


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


@dataclass(frozen=True)
class _Listed:
    """A GPU of the library's list; ``uuids`` are its own and those of its MIG instances."""

    handle: Any
    gpu: Gpu
    uuids: tuple[str, ...]


def read_gpus(
    library: Any = None,
    cuda: Callable[[], Sequence[CudaDevice] | None] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> GpuReport:
    """Ask the driver which GPUs compute for this process, and what they hold now.

    Args:
        library: stands in for the shared library in tests.
        cuda: what CUDA shows, in its order, or None where it cannot be asked; stands in for
            ``list_cuda_devices`` in tests.
        environment: holds what hides GPUs from CUDA.
    """
    nvml = library if library is not None else _open()
    if nvml is None:
        return GpuReport()
    if cuda is None:
        cuda = list_cuda_devices if library is None else lambda: None
    try:
        code = nvml.nvmlInit_v2()
        if code != _SUCCESS:
            return GpuReport(problem=f"nvmlInit failed with code {code}; check the driver")
        try:
            return _read(nvml, cuda, environment)
        finally:
            nvml.nvmlShutdown()
    except (AttributeError, OSError, ctypes.ArgumentError) as error:
        return GpuReport(problem=f"the management library cannot be used: {error}")


def process_bytes(pid: int, library: Any = None, pci_bus_id: str | None = None) -> int | None:
    """Device memory that a process holds, as the driver counts it.

    Args:
        pid: of the process, as the driver sees it; a container may number otherwise.
        library: stands in for the shared library in tests.
        pci_bus_id: of the one GPU that counts; None for all.

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
        held = [_held(nvml, index, pid, pci_bus_id) for index in range(min(count.value, 64))]
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


def _held(nvml: Any, index: int, pid: int, pci_bus_id: str | None) -> int | None:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _SUCCESS:
        return None
    if pci_bus_id is not None and _pci_bus_id(nvml, handle) != pci_bus_id:
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


def _read(
    nvml: Any, cuda: Callable[[], Sequence[CudaDevice] | None], environment: Mapping[str, str]
) -> GpuReport:
    count = ctypes.c_uint()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
        return GpuReport(problem="the driver does not say how many GPUs there are")
    devices = (_device(nvml, index) for index in range(min(count.value, 64)))
    listed = [device for device in devices if device is not None]
    driver = ctypes.create_string_buffer(_NAME_BYTES)
    known = nvml.nvmlSystemGetDriverVersion(driver, _NAME_BYTES) == _SUCCESS
    # Of one GPU there is nothing to hide or to order.
    whole = len(listed) == 1 and len(listed[0].uuids) <= 1
    told = any(name in environment for name in (VISIBLE, ORDER))
    shown = None if not listed or (whole and not told) else cuda()
    problem = ""
    if shown is not None:
        gpus = tuple(_matched(nvml, listed, device) for device in shown)
    else:
        places = visible_places(environment.get(VISIBLE), [device.uuids for device in listed])
        gpus = tuple(listed[place].gpu for place in places)
        if len(listed) > 1:
            problem = "CUDA cannot be asked for its order of GPUs; that of their slots is taken"
    seen = {gpu.pci_bus_id for gpu in gpus}
    hidden = tuple(d.gpu for d in listed if d.gpu.pci_bus_id not in seen)
    return GpuReport(gpus, _text(driver) if known else None, problem, hidden)


def _matched(nvml: Any, listed: Sequence[_Listed], device: CudaDevice) -> Gpu:
    """What the library says of a device of CUDA's."""
    for one in listed:
        if device.uuid is not None and f"GPU-{device.uuid}" in one.uuids:
            return one.gpu
    instance = f"MIG-{device.uuid}"
    for one in listed:
        if instance in one.uuids:
            handle = ctypes.c_void_p()
            code = nvml.nvmlDeviceGetHandleByUUID(instance.encode(), ctypes.byref(handle))
            sizes = _sizes(nvml, handle) if code == _SUCCESS else None
            total, free = sizes or (device.total_bytes, device.total_bytes)
            return replace(one.gpu, name=device.name, total_bytes=total, free_bytes=free)
    for one in listed:
        if device.pci_bus_id is not None and one.gpu.pci_bus_id == device.pci_bus_id:
            return one.gpu
    if len(listed) == 1:
        # A board whose GPU is on no bus.
        return listed[0].gpu
    size = device.total_bytes
    return Gpu(device.name, size, size, device.compute_capability, device.pci_bus_id)


def _device(nvml: Any, index: int) -> _Listed | None:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _SUCCESS:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    named = nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES) == _SUCCESS
    total, free = _sizes(nvml, handle) or (None, None)
    major, minor = ctypes.c_int(), ctypes.c_int()
    capable = (
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        == _SUCCESS
    )
    gpu = Gpu(
        name=_text(name) if named else "NVIDIA GPU",
        total_bytes=total,
        free_bytes=free,
        compute_capability=f"{major.value}.{minor.value}" if capable else None,
        pci_bus_id=_pci_bus_id(nvml, handle),
    )
    return _Listed(handle, gpu, tuple(_uuids(nvml, handle)))


def _sizes(nvml: Any, handle: Any) -> tuple[int, int] | None:
    """Total and free bytes. Boards with unified memory answer "not supported"."""
    memory = _Memory()
    known = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == _SUCCESS
    return (int(memory.total), int(memory.free)) if known and memory.total else None


def _pci_bus_id(nvml: Any, handle: Any) -> str | None:
    pci = _Pci()
    read = getattr(nvml, "nvmlDeviceGetPciInfo_v3", None)
    if read is None or read(handle, ctypes.byref(pci)) != _SUCCESS:
        return None
    return plain_pci_id(pci.id.decode("ascii", errors="replace"))


def _uuids(nvml: Any, handle: Any) -> Iterator[str]:
    """Of the GPU, and of its MIG instances where it is divided."""
    if not hasattr(nvml, "nvmlDeviceGetUUID"):
        return
    room = ctypes.create_string_buffer(_NAME_BYTES)
    if nvml.nvmlDeviceGetUUID(handle, room, _NAME_BYTES) == _SUCCESS:
        yield _text(room)
    count = ctypes.c_uint()
    most = getattr(nvml, "nvmlDeviceGetMaxMigDeviceCount", None)
    if most is None or most(handle, ctypes.byref(count)) != _SUCCESS:
        return
    for index in range(min(count.value, 64)):
        instance = ctypes.c_void_p()
        code = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index, ctypes.byref(instance))
        if code == _SUCCESS and nvml.nvmlDeviceGetUUID(instance, room, _NAME_BYTES) == _SUCCESS:
            yield _text(room)


def _text(buffer: Any) -> str:
    raw: bytes = buffer.value
    return raw.decode("utf-8", errors="replace")
