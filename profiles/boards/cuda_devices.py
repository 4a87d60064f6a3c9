"""CudaDevice: the GPUs that CUDA shows to this process, in the order in which it counts them.

CUDA's driver is the authority: it applies CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, and its usual
order (fastest first) is described nowhere. Asking it starts it, and a process in which it was
started cannot hand it on to children of ``fork()``. So a process that has not started it lets a
child process ask.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SUCCESS, _NO_DEVICE = 0, 100
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_TEXT_BYTES = 256
_MOST_DEVICES = 64
_SECONDS = 30
_LIBRARY = "libcuda.so.1"

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"


@dataclass(frozen=True)
class CudaDevice:
    """One device as CUDA's driver describes it.

    ``uuid`` is that of a MIG instance where the device is one; hexadecimal, without a prefix.
    """

    pci_bus_id: str | None
    uuid: str | None
    name: str
    total_bytes: int | None
    compute_capability: str | None


def list_cuda_devices() -> tuple[CudaDevice, ...] | None:
    """CUDA's devices, in its order.

    Returns:
        None where CUDA's driver is not installed or does not answer.
    """
    driver = _open()
    if driver is None:
        return None
    if _count(driver) is not None:
        return read_devices(driver)
    return _ask_child(*(os.environ.get(name) for name in (VISIBLE, ORDER)))


def start_cuda() -> bool:
    """Start CUDA's driver, in a process that is going to use it anyway; whether it runs."""
    return _start(_open()) == _SUCCESS


def read_devices(driver: Any) -> tuple[CudaDevice, ...] | None:
    """What a started driver says; ``driver`` has the functions of libcuda."""
    count = _count(driver)
    if count is None:
        return None
    try:
        return tuple(_device(driver, index) for index in range(min(count, _MOST_DEVICES)))
    except (AttributeError, ValueError, ctypes.ArgumentError):
        return None


def plain_pci_id(text: str) -> str | None:
    """A PCI id in one form, ``0000:17:00.0``, as libraries write the domain in 4 or 8 digits."""
    domain, _, rest = text.strip().lower().partition(":")
    try:
        return f"{int(domain, 16):04x}:{rest}" if rest else None
    except ValueError:
        return None


def _open() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def _start(driver: Any) -> int | None:
    """What the driver answers; None where there is none."""
    try:
        return None if driver is None else int(driver.cuInit(0))
    except AttributeError:
        return None


def _count(driver: Any) -> int | None:
    """How many devices there are; None where the driver was not started."""
    count = ctypes.c_int()
    try:
        code = driver.cuDeviceGetCount(ctypes.byref(count))
    except (AttributeError, ctypes.ArgumentError):
        return None
    return count.value if code == _SUCCESS else None


def _device(driver: Any, index: int) -> CudaDevice:
    handle = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(index)) != _SUCCESS:
        raise ValueError(f"device {index} cannot be opened")
    place = _text(lambda room: driver.cuDeviceGetPCIBusId(room, _TEXT_BYTES, handle))
    name = _text(lambda room: driver.cuDeviceGetName(room, _TEXT_BYTES, handle))
    size = ctypes.c_size_t()
    sized = driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle) == _SUCCESS
    major, minor = (_attribute(driver, a, handle) for a in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
    return CudaDevice(
        pci_bus_id=None if place is None else plain_pci_id(place),
        uuid=_uuid(driver, handle),
        name=name or "NVIDIA GPU",
        total_bytes=size.value if sized else None,
        compute_capability=None if major is None else f"{major}.{minor or 0}",
    )


def _text(call: Callable[[Any], int]) -> str | None:
    room = ctypes.create_string_buffer(_TEXT_BYTES)
    return room.value.decode("utf-8", errors="replace") if call(room) == _SUCCESS else None


def _attribute(driver: Any, attribute: int, handle: Any) -> int | None:
    value = ctypes.c_int()
    code = driver.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), handle)
    return value.value if code == _SUCCESS else None


def _uuid(driver: Any, handle: Any) -> str | None:
    # The first one gives the whole GPU's where the device is a MIG instance.
    read = getattr(driver, "cuDeviceGetUuid_v2", None) or getattr(driver, "cuDeviceGetUuid", None)
    room = ctypes.create_string_buffer(16)
    if read is None or read(room, handle) != _SUCCESS:
        return None
    return str(uuid.UUID(bytes=room.raw))


@cache
def _ask_child(*_environment: str | None) -> tuple[CudaDevice, ...] | None:
    # Where Python is embedded, this names another program.
    if "python" not in Path(sys.executable or "").name:
        return None
    # Isolated, since nothing but the standard library is needed: no module of the current folder.
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
        found = json.loads(done.stdout)
        return None if found is None else tuple(CudaDevice(**device) for device in found)
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None


def main() -> int:
    """Print the devices as one JSON list, or null."""
    driver = _open()
    code = _start(driver)
    found = () if code == _NO_DEVICE else read_devices(driver)
    print(json.dumps(None if found is None else [asdict(device) for device in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
